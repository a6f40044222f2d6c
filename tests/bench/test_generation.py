"""The benchmark of sampling: both ways draw the same tokens, of the number that it names."""

from bench import generation

TINY = ["--cells", "4", "--dim", "16", "--heads", "2", "--position-depth", "1", "--content-depth", "1", "--rounds", "1"]


def test_both_ways_draw_the_same_tokens(capsys):
    assert generation.main([*TINY, "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "40 codes an image" in out, "8 coarse codes and 32 fine ones"
    assert "tokens drawn: the same" in out
    assert out.count("times as fast") == 3


def test_it_notices_that_they_are_not(capsys, monkeypatch):
    recomputed = generation.recomputed

    def wrong(net, batch):
        tokens = recomputed(net, batch)
        tokens.content[0, 5] += 1
        return tokens

    monkeypatch.setattr(generation, "recomputed", wrong)
    assert generation.main(TINY) == 1
    assert "NOT the same" in capsys.readouterr().out
