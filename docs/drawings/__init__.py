"""The drawings of the pages, each made by one function."""
