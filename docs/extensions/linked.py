"""Public names between backticks become links to the reference."""

import importlib

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

MODULES = ("jaxrnn.analysis", "jaxrnn.convert", "jaxrnn.linen", "jaxrnn.nnx", "jaxrnn.training", "jaxrnn")
SHORT = ("jaxrnn.analysis", "jaxrnn.convert", "jaxrnn.training", "jaxrnn")  # whose names go without their module
TARGETS = {
    short: f"{module}.{name}"
    for module in MODULES
    for name in importlib.import_module(module).__all__
    for short in (f"{module}.{name}", *([name] if module in SHORT else []))
}


class Names(SphinxTransform):
    """All but those of other frameworks, and those in titles and links."""

    default_priority = 400

    def apply(self):
        if self.env.docname.startswith(("coming-from/", "reference/")):
            return
        for node in list(self.document.findall(nodes.literal)):
            target = TARGETS.get(node.astext().partition("(")[0])
            within = node.parent
            while within is not None and not isinstance(within, nodes.title | nodes.reference | pending_xref):
                within = within.parent
            if target and within is None:
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refdoc=self.env.docname)
                node.replace_self(link)
                link += node


def setup(app):
    app.add_transform(Names)
    return {"parallel_read_safe": True}
