"""scikit-learn's MLPClassifier: `partial_fit` takes the steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier

from benchmarks.peers.base import Peer, Training
from benchmarks.problems import Net


class ScikitLearn(Peer):
    """Only training is its business: it has no derivatives to ask for."""

    packages = ("scikit-learn", "numpy")

    def mlp(self, net: Net) -> Training:
        """Return partial_fit of a classifier that begins with the given weights."""
        model = MLPClassifier(
            net.widths[1:-1],
            solver=net.optimizer,
            alpha=0.0,
            batch_size=net.batch,
            learning_rate_init=net.learning_rate,
            momentum=0.0,
            shuffle=False,
        )
        # A first step makes its arrays; then they get their values, and it a fresh optimiser.
        x = np.zeros((net.batch, net.widths[0]), np.float32)
        classes = np.arange(net.widths[-1])
        model.partial_fit(x, np.arange(net.batch) % len(classes), classes=classes)
        for i, (kernel, bias) in enumerate(net.weights()):
            model.coefs_[i][...] = kernel
            model.intercepts_[i][...] = bias
        del model._optimizer

        def step(x: Any, y: Any) -> Any:
            model.partial_fit(x, y)
            return model.loss_

        return step, model.predict_proba


PEER = ScikitLearn
