"""Finished artifacts and reports of somebody else, whose digests fit: manifest.json is not signed."""

from __future__ import annotations

import os

from hostile import Attack
from hostile.spoiling import (
    DEEP,
    changed_report,
    edit,
    external,
    facts,
    flattened,
    header,
    link,
    pipe,
    renamed,
    report,
    spoiled,
    tensors,
)

STORE, MANIFEST = "model/structure.json", "manifest.json"

ATTACKS = (
    Attack("a manifest nested deeply", facts("verify", lambda _: DEEP), 5, "malformed"),
    Attack("a manifest of a number too long", facts("verify", lambda _: "9" * 5000), 5, "malformed"),
    Attack("a manifest that is a list", facts("verify", lambda _: "[]"), 5, "malformed"),
    Attack("a manifest whose files are a list", facts("verify", lambda f: f.update(files=[1])), 5, "malformed"),
    Attack("a manifest that leads out", facts("verify", lambda f: f["files"].update({"../x": {}})), 5, "missing ../x"),
    Attack(
        "a manifest of the root", facts("verify", lambda f: f["files"].update({"/etc/passwd": {}})), 5, "missing /e"
    ),
    Attack(
        "a manifest that drives the terminal", facts("verify", lambda f: f["files"].update({"\x1b[2J": 1})), 5, "x1b["
    ),
    Attack("a manifest of another schema", facts("verify", lambda f: f.update(schema_version="1")), 5, "schema"),
    Attack("a manifest without a profile", facts("verify", lambda f: f.pop("profile")), 5, "profile"),
    Attack(
        "a manifest with a profile of its own", facts("verify", lambda f: f.update(profile={"id": 1})), 5, "profile"
    ),
    Attack("a manifest of another target", facts("verify", lambda f: f["profile"].update(target="../x")), 5, "target"),
    Attack("a manifest of another task", facts("generate", lambda f: f.update(task=["x"])), 5, "what the model does"),
    Attack("a manifest verified by a word", facts("verify", lambda f: f.update(verification="x")), 5, "no tokens"),
    Attack(
        "a manifest with ids that are words", facts("verify", lambda f: f["verification"].update(ids="x")), 5, "ids"
    ),
    Attack(
        "a manifest with ids too large",
        facts("verify", lambda f: f["verification"].update(ids=[[10**9] * 600])),
        5,
        "do not fit",
    ),
    Attack(
        "a manifest with ids beyond 64 bits",
        facts("verify", lambda f: f["verification"].update(ids=[[10**30]])),
        5,
        "ids",
    ),
    Attack(
        "a manifest with ragged ids", facts("verify", lambda f: f["verification"].update(ids=[[1], [2, 3]])), 5, "ids"
    ),
    Attack(
        "a manifest bound by a word",
        facts("verify", lambda f: f["verification"].update(bounds={"shipped": "x"})),
        5,
        "bounds",
    ),
    Attack("a manifest bound by a list", facts("verify", lambda f: f["verification"].update(bounds=[1])), 5, "bounds"),
    Attack(
        "a statement of a file outside",
        facts("report", lambda f: f["files"].update({"../x": {"sha256": "0" * 64}}), "--in-toto"),
        5,
        "names no file below",
    ),
    Attack(
        "a statement of no digest",
        facts("report", lambda f: f["files"].update({"x": 1}), "--in-toto"),
        5,
        "names no file below",
    ),
    Attack("a graph that is a pipe", spoiled("verify", pipe), 5, "onnx"),
    Attack("a graph that links to a device", spoiled("verify", link("onnx/model.onnx", "/dev/zero")), 5, "onnx"),
    Attack("a graph whose weights lie outside", spoiled("generate", external("../../secret")), 5, "onnx"),
    Attack("a graph whose weights are the root's", spoiled("generate", external("/etc/passwd")), 5, "onnx"),
    Attack("a store nested deeply", spoiled("export", edit(STORE, lambda _: DEEP)), 5, "structure.json is malformed"),
    Attack(
        "a store whose module is a number",
        spoiled("export", edit(STORE, lambda f: f.update(module=5))),
        5,
        "structure.json is malformed",
    ),
    Attack(
        "a store that brings its code",
        spoiled(
            "export",
            edit(
                STORE, lambda f: f.update(module={"file": "../evil.py", "callable": "f", "sha256": "0", "folded": []})
            ),
        ),
        5,
        "it is not run",
    ),
    Attack(
        "a store with a config that asks for code",
        spoiled("export", edit("model/config.json", lambda f: f.update(auto_map={"AutoConfig": "evil.C"}))),
        5,
        "asks for code",
    ),
    Attack(
        "a graph with a config that asks for code",
        spoiled("generate", edit("checkpoint/config.json", lambda f: f.update(auto_map={"AutoConfig": "evil.C"}))),
        5,
        "asks for code",
    ),
    Attack(
        "a graph with a tokenizer that asks for code",
        spoiled(
            "generate",
            edit("checkpoint/tokenizer_config.json", lambda f: f.update(auto_map={"AutoTokenizer": "evil.T"})),
        ),
        5,
        "asks for code",
    ),
    Attack(
        "a graph with a config nested deeply",
        spoiled("generate", edit("checkpoint/config.json", lambda _: DEEP)),
        5,
        "config.json",
    ),
    Attack(
        "a store of layers without end",
        spoiled("export", edit("model/config.json", lambda f: f.update(num_hidden_layers=10**9))),
        5,
        "num_hidden_layers",
    ),
    Attack(
        "a store of more layers than it has",
        spoiled("export", edit("model/config.json", lambda f: f.update(num_hidden_layers=4))),
        5,
        "block-0002",
    ),
    Attack(
        "a header nested deeply in a store",
        spoiled("export", header(lambda _: DEEP)),
        5,
        "not a file of a compress store",
    ),
    Attack(
        "a header of numbers in a store",
        spoiled("export", header(lambda _: '{"schema": 1, "layers": [1]}')),
        5,
        "not a file of a compress store",
    ),
    Attack(
        "a store without its layers", spoiled("export", header(lambda layers: layers.clear())), 5, "describes no layer"
    ),
    Attack(
        "a layer of an unknown format",
        spoiled("export", header(lambda layers: layers[0].update(format="evil(x=1)"))),
        5,
        "describes a layer badly",
    ),
    Attack(
        "a layer of groups of nothing",
        spoiled("export", header(lambda layers: layers[0].update(format="int8(group=0)"))),
        5,
        "describes a layer badly",
    ),
    Attack(
        "a layer of 99 bits",
        spoiled("export", header(lambda layers: layers[0].update(format="int99"))),
        5,
        "describes a layer badly",
    ),
    Attack(
        "a layer with a user of its own",
        spoiled("export", header(lambda layers: layers[0].update(users=["evil"]))),
        5,
        "is used by",
    ),
    Attack(
        "a layer with a number for a user",
        spoiled("export", header(lambda layers: layers[0].update(users=5))),
        5,
        "describes a layer badly",
    ),
    Attack(
        "a layer of another name",
        spoiled("export", header(lambda layers: layers[0].update(name="../x"))),
        5,
        "describes a layer badly",
    ),
    Attack(
        "a layer of another shape",
        spoiled("export", header(lambda layers: layers[0].update(shape=[1 << 40, 1 << 40]))),
        5,
        "by config.json",
    ),
    Attack(
        "a layer of a shape of words",
        spoiled("export", header(lambda layers: layers[0].update(shape=["x"]))),
        5,
        "describes a layer badly",
    ),
    Attack("a layer without its codes", spoiled("export", tensors(renamed)), 5, "cannot be read"),
    Attack("a layer with codes in a row", spoiled("export", tensors(flattened)), 5, "stores"),
    Attack("a report nested deeply", report(DEEP), 5, "not JSON"),
    Attack("a report of several recipes nested deeply", report('{"kind": "sweep", "a": ' + DEEP), 5, "not JSON"),
    Attack("a report of a number too long", report("9" * 5000), 5, "not JSON"),
    Attack("a report of several recipes, of words", report('{"kind": "sweep", "schema_version": "x"}'), 5, "schema"),
    Attack("a report that is no report", report('{"schema_version": 1}'), 5, "not a valid report"),
    Attack(
        "a report of a version that drives the terminal",
        report('{"schema_version": "\\u001b[2J"}'),
        5,
        "schema_version",
    ),
    Attack(
        "a report of passes of words", changed_report(lambda f: f.update(passes="\x1b[2J")), 5, "not a valid report"
    ),
    Attack("a report that is a device", lambda place: ["report", "/dev/zero"], 5, "report"),
    Attack(
        "a report that is a pipe",
        lambda place: (os.mkfifo(place.folder / "p"), ["report", place.folder / "p"])[1],
        5,
        "report",
    ),
)
