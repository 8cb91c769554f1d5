"""`python -m jaxformers.native` says whether operations in C are used, and if not, why."""

from jaxformers.native.library import obstacle

if __name__ == "__main__":
    why = obstacle()
    print("operations in C are used" if why is None else f"no operations in C: {why}")
