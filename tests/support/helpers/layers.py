"""What tests of torch's layers have in common: designs, groups of parameters, models as functions, training."""

from collections import Counter

from torch import nn

import structlin
from structlin_nn.torch import StructuredLinear

# Of each structure: name, shape and options of all examples, and of the first.
EXAMPLES = [(name, *e) for name in structlin.structure_names() for e in structlin.structure_class(name).examples]
EACH = [(name, *structlin.structure_class(name).examples[0]) for name in structlin.structure_names()]


def structured(model):
    return [name for name, module in model.named_modules() if isinstance(module, StructuredLinear)]


def multipliers(groups):
    return {name: group["multiplier"] for group in groups for name in group["names"]}


def decays(groups):
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def assert_covers(groups, model):
    """Each trainable parameter stands in the groups once, under its own name."""
    named = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert Counter(id(p) for _, p in named) == Counter(id(p) for p in model.parameters() if p.requires_grad)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert all(own[name] is parameter for name, parameter in named)


def losses(optimizer, loss, steps):
    """Train on ``loss()`` and return its values."""
    found = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found


class Tied(nn.Module):
    """A head with the weight of the embedding."""

    def __init__(self, words, width):
        super().__init__()
        self.embedding, self.body = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)))


class Call(nn.Module):
    """A function as a module, with modules and parameters by keyword."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)
