"""AC-ODM's online learner: its network, that its actor is trained, and that it resumes exactly."""

import json

import numpy as np
import pytest
from mixing_worlds import GradientWorld, LawWorld, observe, table_of, train

from mixloader.policies import make_policy
from mixloader.policies.set_network import Adam, SetNetwork


def test_the_actor_learns_which_gradients_agree():
    """a, b and c pull together, d against them. ODM, followed at first, prefers d for its loss; the actor drops it."""
    centres = np.array([[3.0, 1, 0], [3, -1, 0], [3, 0, 1], [-3, 0, 0]])
    paths = []
    for _ in range(2):
        policy = make_policy("acodm", warmup_steps=60, seed=1, updates=3)
        paths.append(train(GradientWorld(centres, centres[:1], rate=0.02), policy, table_of(4), 300))
    assert paths[0][30:60, 3].mean() > 0.3
    assert paths[0][-30:, 3].mean() < 0.1
    np.testing.assert_array_equal(*paths)  # from its seed alone
    fresh = make_policy("acodm", seed=1)
    fresh.reset(table_of(4))
    own, first = policy.actor.parameters[:7], fresh.actor.parameters[:7]  # the last two shift all logits alike
    assert all(np.abs(p - q).max() > 1e-3 for p, q in zip(own, first, strict=True))
    slow = np.abs(policy._slow_actor.parameters[0] - first[0]).max()  # the target network trails behind
    assert 1e-4 < slow < 0.7 * np.abs(own[0] - first[0]).max()


@pytest.mark.parametrize("agreeing", [("a", "b"), ("b", "c")])
def test_the_actor_follows_the_rewards_wherever_they_are(agreeing):
    """The same losses in both cases; only whose gradients agree is different."""
    gradients = np.array([[1.0, 0.2 * d] if name in agreeing else [-1.0, 0.1] for d, name in enumerate("abc")])
    policy = make_policy("acodm", warmup_steps=0, updates=1)
    policy.reset(table_of(3))
    weights, rng = np.full(3, 1 / 3), np.random.default_rng(0)
    for step in range(300):
        losses = [3, 2, 1] + 0.02 * rng.standard_normal(3)
        weights = policy.decide(observe(losses, weights, step=step, gram=gradients @ gradients.T))
    assert weights["abc".index(({*"abc"} - {*agreeing}).pop())] < 0.05


def test_while_warming_up_the_actor_imitates_odm():
    policy = make_policy("acodm", warmup_steps=10**6, learning_rate=0.01, updates=1)
    path = train(LawWorld([1.0, 2, 3], [1.0] * 3, [1e6] * 3, [0.5] * 3), policy, table_of(3), 300)
    odm = train(
        LawWorld([1.0, 2, 3], [1.0] * 3, [1e6] * 3, [0.5] * 3), make_policy("odm", form="code"), table_of(3), 300
    )
    np.testing.assert_array_equal(path, odm)
    state = policy._past[-1:, :, :4]
    logits, _ = policy.actor.forward(state)
    own = np.exp(logits[0]) / np.exp(logits[0]).sum()
    np.testing.assert_allclose(own, path[-1], atol=0.05)


def test_gradients_of_the_set_network():
    rng = np.random.default_rng(0)
    network = SetNetwork(3, 5, rng)
    network.parameters = [rng.normal(0, 0.5, p.shape) for p in network.parameters]  # float64, to differentiate
    x, d_out = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 4))
    out, inputs = network.forward(x)
    gradients, d_x = network.backward(inputs, d_out)
    order = rng.permutation(4)
    np.testing.assert_allclose(network.forward(x[:, order])[0], out[:, order])
    for array, gradient in [*zip(network.parameters, gradients, strict=True), (x, d_x)]:
        for index in np.ndindex(array.shape):
            was, values = array[index], []
            for shift in (1e-6, -1e-6):
                array[index] = was + shift
                values.append((network.forward(x)[0] * d_out).sum())
            array[index] = was
            assert abs((values[0] - values[1]) / 2e-6 - gradient[index]) < 1e-6


def test_adam_is_torch_s():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    p = rng.normal(size=(3, 2)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(p.copy()))
    adam, optimizer = Adam([p], 0.01), torch.optim.Adam([theirs], lr=0.01)
    for _ in range(20):
        gradient = rng.normal(size=(3, 2)).astype(np.float32)
        adam.step([gradient])
        theirs.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(p, theirs.detach().numpy(), atol=2e-6)


def test_a_resumed_actor_critic_goes_on_exactly():
    centres = np.array([[3.0, 1], [3, -1], [-3, 0]])
    whole = make_policy("acodm", warmup_steps=20, seed=2, updates=1)
    whole.reset(table_of(3))
    world = GradientWorld(centres, centres[:1])
    observations = []
    for step in range(60):
        losses = world.train(np.full(3, 1 / 3))
        observations.append(observe(losses, step=step, **world.signals()))
    for observation in observations[:40]:
        whole.decide(observation)
    resumed = make_policy("acodm", warmup_steps=20, seed=2, updates=1)
    resumed.reset(table_of(3))
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for observation in observations[40:]:
        np.testing.assert_array_equal(whole.decide(observation), resumed.decide(observation))
