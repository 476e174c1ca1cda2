"""``configurable`` in both forms, and objects built from ``_target_``."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from detectron2.config import CfgNode, LazyCall, LazyConfig, configurable, instantiate


class Shape:
    @configurable
    def __init__(self, width, height=2, *, color="red"):
        """Doc of Shape."""
        self.values = (width, height, color)

    @classmethod
    def from_config(cls, cfg, height_factor=1):
        return {"width": cfg.WIDTH, "height": cfg.HEIGHT * height_factor}


class Derived(Shape):
    @configurable
    def __init__(self, *, extra, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra

    @classmethod
    def from_config(cls, cfg, *args, **kwargs):
        return {**super().from_config(cfg), "extra": (args, kwargs)}


@configurable(from_config=lambda cfg, scale: {"a": cfg.WIDTH * scale, "b": 1})
def function(a, b=0, c=0):
    return a, b, c


CFG = CfgNode({"WIDTH": 5, "HEIGHT": 7})


@pytest.mark.parametrize("cfg", [CFG, OmegaConf.create({"WIDTH": 5, "HEIGHT": 7})], ids=["CfgNode", "DictConfig"])
def test_config_form_of_a_class(cfg):
    assert Shape(cfg).values == (5, 7, "red")
    assert Shape(cfg=cfg).values == (5, 7, "red")
    assert Shape(cfg, color="blue").values == (5, 7, "blue")
    assert Shape(cfg, 3).values == (5, 21, "red")  # positional arguments go to from_config
    assert Shape(cfg, height_factor=2, width=1).values == (1, 14, "red")


def test_explicit_form_of_a_class():
    assert Shape(1).values == (1, 2, "red")
    assert Shape(width=1, height=3, color="c").values == (1, 3, "c")
    assert Shape.__init__.__doc__ == "Doc of Shape."
    with pytest.raises(TypeError):
        Shape(CFG, nothing=1)


def test_variadic_from_config_gets_everything():
    built = Derived(CFG, 1, key=2)
    assert built.values == (5, 7, "red") and built.extra == ((1,), {"key": 2})
    assert Derived(extra=0, width=4).values == (4, 2, "red")


def test_function():
    assert function(CFG, 2) == (10, 1, 0)
    assert function(CFG, scale=3, c=4) == (15, 1, 4)
    assert function(1, c=2) == (1, 0, 2)
    assert function.from_config(CFG, 1) == {"a": 5, "b": 1}
    with pytest.raises(TypeError):
        function(CFG)


def test_misuse():
    class WithoutFromConfig:
        @configurable
        def __init__(self, a=1):
            pass

    class NoClassmethod:
        @configurable
        def __init__(self, a=1):
            pass

        def from_config(self, cfg):
            return {}

    class OtherName:
        @configurable
        def __init__(self, a=1):
            pass

        @classmethod
        def from_config(cls, config):
            return {}

    with pytest.raises(AttributeError, match="from_config"):
        WithoutFromConfig(CFG)
    with pytest.raises(TypeError, match="classmethod"):
        NoClassmethod(CFG)
    with pytest.raises(TypeError, match="'cfg'"):
        OtherName(CFG)
    with pytest.raises(AssertionError):
        configurable(function)
    with pytest.raises(AssertionError):
        configurable(from_config="name")


@dataclasses.dataclass
class Point:
    x: int
    y: int = 2


class Holder:
    def __init__(self, value, other=None):
        self.value, self.other = value, other


def test_instantiate():
    built = instantiate(LazyCall(Holder)(value=LazyCall(Point)(x=1), other=[1, LazyCall(Point)(x=2, y=3)]))
    assert built.value == Point(1) and list(built.other) == [1, Point(2, 3)]
    assert instantiate({"_target_": "collections.OrderedDict", "a": 1}) == {"a": 1}
    assert instantiate([{"_target_": dict, "b": 2}, 5]) == [{"b": 2}, 5]
    for unchanged in (5, "text", {"a": 1}, Point(1)):
        assert instantiate(unchanged) is unchanged


def test_interpolation_is_resolved_when_built():
    cfg = LazyCall(Holder)(value=3, other="${value}")
    cfg.value = 4
    assert instantiate(cfg).other == 4


def test_instantiate_errors():
    with pytest.raises(Exception, match="no_such_module"):
        instantiate({"_target_": "no_such_module.Thing"})
    with pytest.raises(TypeError):
        instantiate({"_target_": Holder, "nothing": 1})
    with pytest.raises(TypeError):
        LazyCall(3)


@pytest.mark.embedded_only
def test_lazy_config_files_need_upstream():
    with pytest.raises(NotImplementedError, match=r"LazyConfig\.load\('a\.py'\) is not part .* pip install"):
        LazyConfig.load("a.py")
