"""What the four scripts share: one concern a file, none of them imports a script."""
