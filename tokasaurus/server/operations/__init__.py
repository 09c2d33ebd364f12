"""What a client can ask for, in whatever protocol, and how it is carried out."""
