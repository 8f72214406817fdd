"""What people read of a start, and what is written down."""

from fastsskd.starting.report import StartReport


def report():
    report = StartReport("a ViT, 64 wide")
    report.add("loaded", "blocks.0.norm1.weight", ("blocks.0.norm1.weight",))
    report.add("loaded", "blocks.0.attn.qkv.bias", ("block_0/query/bias", "block_0/key/bias"))
    report.add("resized", "pos_embed", ("pos_embed",), "14 x 14 to 64 x 8")
    report.add("ignored", "head/kernel", ("head/kernel",), "for its own classes")
    report.add("ignored", "head/bias", ("head/bias",), "for its own classes")
    report.add("ignored", "head/new", ("head/new",), "strange")
    report.add("missing", "mae.mask_token", note="fresh")
    return report


def test_people_see_groups_with_their_reasons():
    assert report().lines() == [
        "a ViT, 64 wide: 2 loaded, 1 resized, 3 ignored, 1 missing",
        "  loaded 2: blocks.* (2)",
        "  resized 1: pos_embed (14 x 14 to 64 x 8)",
        "  ignored 3: head.* (2; for its own classes), head/new (strange)",
        "  missing 1: mae.mask_token (fresh)",
    ]


def test_where_all_is_loaded_one_line_is_enough():
    whole = StartReport("a model of ours")
    whole.add("loaded", "a", ("a",))
    assert whole.lines() == ["a model of ours: 1 loaded, 0 resized, 0 ignored, 0 missing"]


def test_the_table_has_a_line_for_each_weight():
    lines = report().table().splitlines()
    assert lines[0].split("\t") == ["fate", "weight", "in_the_file", "note"] and len(lines) == 8
    assert lines[2] == "loaded\tblocks.0.attn.qkv.bias\tblock_0/query/bias block_0/key/bias\t"
    assert lines[7] == "missing\tmae.mask_token\t\tfresh"
