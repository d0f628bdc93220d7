"""Structures from outside of the package, and what the register refuses."""

import numpy as np
import pytest

import structlin
from structlin import Structure, design, structure_class, structure_names
from structlin.testing import check_structure


class Sandwich(structlin.NamedOperator):
    formula = "i,ri->r; r,sr->s; s,os->o"
    parameters = "r (d_in + s) + s d_out"
    source = "-"
    examples = (((5, 7), {"r": 2, "s": 3}),)

    @staticmethod
    def design(shape, *, r=1, s=1):
        return Structure.parse(Sandwich.formula, i=shape[1], r=r, s=s, o=shape[0])


@pytest.fixture
def sandwich():
    structlin.register("sandwich")(Sandwich)
    yield Sandwich
    structlin.unregister("sandwich")


def test_a_structure_from_outside_inherits_checks_options_and_constructors(sandwich):
    assert structure_names()[-1] == "sandwich"
    assert structure_class("sandwich") is sandwich
    assert structlin.structure_options("sandwich") == {"r": 1, "s": 1}
    for backend in ("numpy", "torch"):
        check_structure(structure_class("sandwich"), backend=backend, dtype="float32")
    assert structlin.register("sandwich")(sandwich) is sandwich  # the module may be reloaded


def test_the_register_refuses(sandwich):
    with pytest.raises(ValueError, match="must be an identifier, got 'low rank'"):
        structlin.register("low rank")
    with pytest.raises(TypeError, match="only subclasses of NamedOperator can be registered, got <class 'int'>"):
        structlin.register("number")(int)
    with pytest.raises(ValueError, match=r"'dense' is already registered: structlin.structures.dense.Dense"):
        structlin.register("dense")(Sandwich)
    impostor = type("Dense", (Sandwich,), {"__qualname__": "Dense"})  # a built-in's class name, from another module
    with pytest.raises(ValueError, match=r"choose another name, or call unregister\('dense'\) first"):
        structlin.register("dense")(impostor)
    assert structure_class("dense") is structlin.Dense
    again = type("Sandwich", (Sandwich,), {"__qualname__": Sandwich.__qualname__})  # the module was run again
    assert structlin.register("sandwich")(again) is structure_class("sandwich")
    for call in (structure_class, structlin.unregister, structlin.structure_options):
        with pytest.raises(ValueError, match="unknown structure 'desne'; one of dense, low_rank"):
            call("desne")
    with pytest.raises(ValueError, match="unknown structure 'desne'"):
        design("desne", (2, 2))


def test_other_refusals():
    with pytest.raises(ValueError, match=r"at least d_out = 4 >= 1 entries, got shape \(3,\)"):
        structlin.Toeplitz.from_kernel(np.ones(3), 4)
    with pytest.raises(
        ValueError, match=r"for chains 'gba,gfdra->frgbd; frgbd,fergb->fed' with d_in and d_out above 1, got"
    ):
        structlin.theta_of(design("dense", (4, 4)))


@pytest.mark.parametrize(("short", "name"), [("btt", "block_tensor_train"), ("TT", "tensor_train"), ("lr", "low_rank")])
def test_initials_name_the_structure_that_they_stand_for(short, name):
    with pytest.raises(ValueError, match=rf"unknown structure '{short}' \('{name}' has these initials\); one of dense"):
        structure_class(short)


def test_one_letter_and_other_words_stand_for_nothing():
    for text in ("b", "butter", ""):
        with pytest.raises(ValueError, match=rf"unknown structure '{text}'; one of dense"):
            structure_class(text)
