"""The parts that networks name, and those that are found of a module that names none."""

from torch import nn

from ldm.modules.parts import Parts, find_parts


def test_a_module_that_names_nothing_has_its_last_layer():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 1, 3), nn.Tanh())
    assert find_parts(network) == Parts(output=("2.*",), last_layer="2")
    assert find_parts(nn.Tanh()) == Parts()


def test_parts_of_a_network_inside_another_module_have_its_names():
    inner = Parts({"label.weight": 1}, ("time.*",), ("time.*", "label.*"), ("out.*",), "out.2", {"mid": "middle"})
    outer = inner.below("model.")
    assert outer.class_tables == {"model.label.weight": 1}
    assert outer.condition == ("model.time.*", "model.label.*")
    assert (outer.last_layer, outer.taps) == ("model.out.2", {"mid": "model.middle"})
    assert inner.below("") == inner
