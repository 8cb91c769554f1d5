"""From text to text: models paired with their tokenizers."""
