"""Other people's programs that run engines, each in a module that is imported only on demand."""
