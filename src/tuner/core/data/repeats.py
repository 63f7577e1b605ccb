"""How often an image is seen in an epoch: the balance of regularisation images."""

from __future__ import annotations

from collections.abc import Sequence


def balance_regularisation(training_visits: int, repeats: Sequence[int]) -> list[int]:
    """Repeats of each regularisation image so that together they match the training images (kohya-ss/sd-scripts).

    training_visits: training images of the set, counted with repeats.
    repeats: the repeats each regularisation image asks for, in order.

    The first pass takes images with their own repeats until the sum is reached; images it does not get to are unused
    (0). If the sum was not reached, further passes add one repeat to each image in turn.
    """
    balanced = [0] * len(repeats)
    total = 0
    for index, count in enumerate(repeats):
        if total >= training_visits:
            return balanced
        balanced[index] = count
        total += count
    while repeats and total < training_visits:
        for index in range(len(repeats)):
            if total >= training_visits:
                break
            balanced[index] += 1
            total += 1
    return balanced
