"""Louver inside other people's engines. Each engine's library is imported only in its own folder."""
