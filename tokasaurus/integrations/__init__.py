"""Other people's programs that run engines, each in a package that is imported only on demand."""
