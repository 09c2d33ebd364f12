"""The commands of ``toka-cartridge``."""
