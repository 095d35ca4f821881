"""The whole job on data that ships with the installed libraries: glyphs as source, handwritten digits as target."""
