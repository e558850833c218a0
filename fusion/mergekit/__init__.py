"""mergekit's recipes in and out: read, explained line by line, translated to a Recipe and back.

    from fusion.mergekit import export_text, import_text, lint
    recipes, notes = import_text(open("mergekit.yaml").read())
"""

from fusion.mergekit.document import Note
from fusion.mergekit.exporting import export_text
from fusion.mergekit.importing import import_text
from fusion.mergekit.linting import lint
from fusion.mergekit.outline import tensor_names
from fusion.mergekit.reading import is_mergekit

__all__ = ["Note", "export_text", "import_text", "is_mergekit", "lint", "tensor_names"]
