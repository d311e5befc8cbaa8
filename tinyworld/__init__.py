"""A small world of coloured shapes whose truth can be computed: the embedded default of every command."""
