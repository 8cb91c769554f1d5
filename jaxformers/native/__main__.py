"""`python -m jaxformers.native` says whether operations in C are used, and if not, why."""

from jaxformers.native.library import has_matrix_units, obstacle

if __name__ == "__main__":
    why = obstacle()
    print("operations in C are used" if why is None else f"no operations in C: {why}")
    if has_matrix_units():
        print("products of many rows use the matrix units of the processor (AMX)")
    elif why is None:
        print("this processor has no matrix units (AMX), so products of many rows are XLA's")
