"""The families of Hugging Face: a file per lineage, which holds data only.

The facts are those of the configuration and modeling files of transformers. A comment above each
family names its paper. docs/families.md says how to add a family.
"""

from jaxformers.hf.families import (
    albert,
    arcee,
    bart,
    bert,
    bloom,
    cohere,
    distilbert,
    electra,
    eurobert,
    exaone4,
    falcon,
    gemma,
    glm,
    gpt,
    granite,
    helium,
    llama,
    mistral,
    modernbert,
    mpnet,
    mpt,
    nemotron,
    nomic_bert,
    olmo,
    opt,
    phi,
    qwen,
    roberta,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    t5,
)

# A model that comes from no checkpoint is saved in the first family that fits, in this order.
FAMILIES = {
    family.model_type: family
    for families in (
        llama.FAMILIES,
        mistral.FAMILIES,
        qwen.FAMILIES,
        gemma.FAMILIES,
        phi.FAMILIES,
        olmo.FAMILIES,
        smollm3.FAMILIES,
        granite.FAMILIES,
        cohere.FAMILIES,
        starcoder2.FAMILIES,
        seed_oss.FAMILIES,
        arcee.FAMILIES,
        nemotron.FAMILIES,
        exaone4.FAMILIES,
        glm.FAMILIES,
        helium.FAMILIES,
        stablelm.FAMILIES,
        gpt.FAMILIES,
        opt.FAMILIES,
        bloom.FAMILIES,
        mpt.FAMILIES,
        falcon.FAMILIES,
        t5.FAMILIES,
        bart.FAMILIES,
        bert.FAMILIES,
        roberta.FAMILIES,
        distilbert.FAMILIES,
        electra.FAMILIES,
        albert.FAMILIES,
        mpnet.FAMILIES,
        modernbert.FAMILIES,
        nomic_bert.FAMILIES,
        eurobert.FAMILIES,
    )
    for family in families
}
