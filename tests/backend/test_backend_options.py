"""Options of the backend: what modes and options mean, and which are refused."""

import pytest

from fusion.backend.options import BackendOptions


def test_the_default_fuses_without_tuning_and_leaves_inductor_as_it_is():
    options = BackendOptions.parse()
    assert options == BackendOptions()
    assert (options.strict, options.tune, options.min_speedup, options.inductor) == (False, False, 1.0, {})


@pytest.mark.parametrize(
    ("mode", "tune", "graphs"),
    [
        ("default", False, False),
        ("reduce-overhead", False, True),
        ("max-autotune", True, True),
        ("max-autotune-no-cudagraphs", True, False),
    ],
)
def test_modes_mean_what_they_mean_to_inductor_and_tune_where_it_does(mode, tune, graphs):
    for options in (BackendOptions.parse(mode), BackendOptions.parse(options={"mode": mode})):
        assert options.tune is tune
        assert options.inductor.get("triton.cudagraphs", False) is graphs


def test_own_options_and_those_of_inductor_go_together():
    options = BackendOptions.parse(options={"strict": True, "min_speedup": 0, "max_autotune": True, "tune": False})
    assert options.strict and options.min_speedup == 0 and not options.tune
    assert options.inductor == {"max_autotune": True}
    assert BackendOptions.parse(options={"mode": "max-autotune", "tune": False}).tune is False


def test_an_unknown_option_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"'fast', 'stric'.*min_speedup, mode, strict, tune.*list_options"):
        BackendOptions.parse(options={"stric": True, "fast": 1, "tune": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": "yes"}, "strict='yes' is not supported, use True or False"),
        ({"tune": 1}, "tune=1 is not supported"),
        ({"min_speedup": -1}, "min_speedup=-1 is not supported, use a number from 0"),
        ({"min_speedup": float("nan")}, "min_speedup=nan"),
        ({"min_speedup": True}, "min_speedup=True"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"mode": "fast"}, "mode 'fast' is unknown; use one of default,.*reduce-overhead"),
    ],
)
def test_values_that_are_not_supported_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BackendOptions.parse(options=options)
