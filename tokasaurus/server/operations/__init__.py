"""What a client can ask for, in whatever protocol: an operation, its schemas, how it is carried out."""
