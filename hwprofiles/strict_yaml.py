"""YAML that nobody vouches for: data alone, no key twice, and aliases that stand for no more than they would in full.

Ten aliases of ten aliases of ten … make a thousand million values of a few hundred bytes.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""Of a file, with each alias written out."""


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> object:
    """What a text says. Raises: yaml.YAMLError, and ValueError for figures, dates and nesting that are none."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        found: object = loader.construct_document(node)
        return found
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, each alias counted as often as it stands there. Raises: ConstructorError for too many."""
    if id(node) in known:
        if not known[id(node)]:
            raise _refused("an alias stands inside what it stands for", node)
        return known[id(node)]
    known[id(node)] = 0
    found = 1
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        found += sum(_count(each, known) for each in (part if isinstance(part, tuple) else (part,)))
    if found > MOST_VALUES:
        raise _refused(f"an alias makes more than {MOST_VALUES:,} values", node)
    known[id(node)] = found
    return found


def _refused(why: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, f"{why}; write them out", node.start_mark)
