"""Making a cartridge by training: conversations about a document, and distillation on them."""
