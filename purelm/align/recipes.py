"""Published recipes of reinforcement learning, by name.

    recipe = adapted(RECIPES["dapo"], prompts=8, max_new_tokens=256)
    loss, metrics = policy_loss(recipe.objective, batch)
    differences(RECIPES["grpo"], RECIPES["dr_grpo"])      # {field: (of grpo, of dr_grpo)}

A recipe is a starting point: sources leave things out, and each says in `note` what was chosen here.
`python -m experiments.recipes [A B]` prints them.
"""

from dataclasses import replace
from functools import partial

from purelm.align import advantages as adv
from purelm.align import aggregation, divergences, ratios, regions, shaping, weights
from purelm.align.objective import Objective
from purelm.align.recipe import Recipe, adapted, differences, fields_of

__all__ = ["RECIPES", "Recipe", "adapted", "differences", "fields_of"]

# on-policy: one update a rollout batch, without old log-probabilities
_REINFORCE = Objective(adv.group_normalized, ratios.none, regions.reinforce, aggregation.sequence_mean)
_GRPO = replace(_REINFORCE, ratio=ratios.token, region=partial(regions.clip, low=0.2, high=0.2))

_COURSE_2025 = Recipe(
    _REINFORCE,
    "CS336 2025, assignment 5, section 7 (reinforce_with_baseline)",
    group_size=8,
    prompts=32,
    max_new_tokens=1024,
    min_new_tokens=4,
    lr=1e-5,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    max_norm=1.0,
    steps=200,
)
_COURSE_2025_OFF = replace(
    _COURSE_2025,
    objective=_GRPO,
    source="CS336 2025, assignment 5, section 8 (grpo_clip)",
    epochs=2,
    note="the sweep's epochs and train batch are the student's: 2 epochs here; clip 0.2 is the handout's example",
)
_COURSE_2026 = replace(
    _COURSE_2025, source="CS336 2026, assignment 5 (2.0.1), GRPO", max_new_tokens=512, min_new_tokens=1
)
_COURSE_2026_OFF = replace(
    _COURSE_2026, objective=_GRPO, source="CS336 2026, assignment 5 (2.0.1), off-policy", minibatches=32
)
_OLMO3 = Recipe(
    Objective(adv.centered, ratios.token, partial(regions.clip, low=0.2, high=0.272), aggregation.token_mean),
    "Olmo 3 (arXiv:2512.13961), table 49, 7B-Think",
    group_size=8,
    prompts=64,
    max_new_tokens=32768,
    lr=1e-6,
    steps=1400,
    flat_groups="refill",
    note="equation 1 prints the token mean of each group; code and table have that of the batch",
)
_TIS = replace(_OLMO3.objective, weight=partial(weights.truncated, cap=2.0))
_SLIME = Recipe(
    replace(_GRPO, region=partial(regions.clip, low=0.2, high=0.28)),
    "THUDM/slime, scripts/run-glm4-9B.sh",
    group_size=8,
    prompts=32,
    max_new_tokens=8192,
    temperature=0.8,
    lr=1e-6,
    betas=(0.9, 0.98),
    weight_decay=0.1,
    steps=3000,
)

RECIPES: dict[str, Recipe] = {
    "course2025": _COURSE_2025,
    "course2025_no_baseline": replace(
        _COURSE_2025,
        objective=replace(_REINFORCE, advantage=adv.raw),
        source="CS336 2025, assignment 5, section 8 (no_baseline)",
    ),
    "course2025_off_policy": _COURSE_2025_OFF,
    "course2025_no_clip": replace(
        _COURSE_2025_OFF,
        objective=replace(_GRPO, region=regions.unclipped),
        source="CS336 2025, assignment 5, section 8 (GRPO-No-Clip)",
    ),
    "course2026_grpo": _COURSE_2026,
    "course2026_dr_grpo": replace(
        _COURSE_2026,
        objective=replace(_REINFORCE, advantage=adv.centered, aggregate=partial(aggregation.constant, length=512)),
        source="CS336 2026, assignment 5 (2.0.1), Dr. GRPO: the sum divided by Z = B G L",
    ),
    "course2026_maxrl": replace(
        _COURSE_2026,
        objective=replace(_REINFORCE, advantage=adv.max_rl),
        source="CS336 2026, assignment 5 (2.0.1), MaxRL; arXiv:2602.02710",
        note="mean over sequences as in its GRPO",
    ),
    "course2026_rft": replace(
        _COURSE_2026,
        objective=replace(_REINFORCE, advantage=adv.positive_only),
        source="CS336 2026, assignment 5 (2.0.1), RFT",
        note="mean over sequences as in its GRPO; wrong ones count in the denominator",
    ),
    "course2026_off_naive": replace(_COURSE_2026_OFF, objective=_REINFORCE),
    "course2026_off_no_clip": replace(_COURSE_2026_OFF, objective=replace(_GRPO, region=regions.unclipped)),
    "course2026_off_clip": _COURSE_2026_OFF,
    "course2026_off_gspo": replace(
        _COURSE_2026_OFF,
        objective=replace(_GRPO, ratio=ratios.sequence, region=partial(regions.clip, low=3e-4, high=3e-4)),
    ),
    "grpo": Recipe(
        replace(_GRPO, kl=divergences.k3, kl_coefficient=0.04),
        "GRPO, DeepSeekMath (arXiv:2402.03300), sections 4.1.1 and 4.2",
        group_size=64,
        prompts=16,
        max_new_tokens=1024,
        lr=1e-6,
        note="the paper gives no clip: 0.2 here; 1,024 samples a batch, one update each",
    ),
    "dr_grpo": Recipe(
        replace(_GRPO, advantage=adv.centered, aggregate=partial(aggregation.constant, length=3000)),
        "Dr. GRPO (arXiv:2503.20783); sail-sg/understand-r1-zero, examples",
        group_size=8,
        prompts=128,
        max_new_tokens=3000,
        lr=1e-6,
        minibatches=8,
        note="rollout_batch_size 128 is read as prompts, train_batch_size 128 as samples",
    ),
    "rloo": Recipe(
        Objective(adv.leave_one_out, ratios.none, regions.reinforce, aggregation.sequence_sum),
        "RLOO (arXiv:2402.14740); TRL's defaults of G and beta",
        group_size=2,
        kl_in_reward=0.05,
    ),
    "dapo": Recipe(
        replace(_GRPO, region=partial(regions.clip, low=0.2, high=0.28), aggregate=aggregation.token_mean),
        "DAPO (arXiv:2503.14476), section 4.1; verl's run_dapo_qwen2.5_32b.sh",
        group_size=16,
        prompts=512,
        max_new_tokens=20480,
        minibatches=16,
        flat_groups="rounds",
        length_reward=partial(shaping.soft_overlong, longest=20480, buffer=4096),
        lr=1e-6,
        note="equation 8 prints the token mean of each group; the script has that of the batch, and a dual clip of 10",
    ),
    "gspo": Recipe(
        replace(_GRPO, ratio=ratios.sequence, region=partial(regions.clip, low=3e-4, high=4e-4)),
        "GSPO (arXiv:2507.18071), section 5.1",
        group_size=8,
        minibatches=4,
        note="the paper gives no group size: 8 here",
    ),
    "cispo": Recipe(
        replace(_GRPO, region=partial(regions.cispo, cap=5.0), aggregate=aggregation.token_mean),
        "CISPO, MiniMax-M1 (arXiv:2506.13585); cap as in TRL and ScaleRL",
        group_size=16,
        minibatches=16,
        note="the paper prints the token mean of each group and no cap; group size and minibatches of DAPO's here",
    ),
    "olmo3": _OLMO3,
    "olmo3_32b_think": replace(
        _OLMO3,
        objective=_TIS,
        source="Olmo 3 (arXiv:2512.13961), table 49, 32B-Think",
        prompts=128,
        asynchrony=8,
        lr=2e-6,
        steps=750,
        note="the script has 64 prompts",
    ),
    "olmo3_7b_instruct": replace(
        _OLMO3,
        source="Olmo 3 (arXiv:2512.13961), table 49, 7B-Instruct",
        max_new_tokens=8192,
        minibatches=4,
        asynchrony=8,
        retire_rate=0.875,
        steps=450,
    ),
    "olmo3_rl_zero": replace(
        _OLMO3,
        objective=_TIS,
        source="Olmo 3 (arXiv:2512.13961), table 49, RL-Zero",
        prompts=32,
        max_new_tokens=16384,
        asynchrony=8,
        retire_rate=0.875,
        steps=2000,
    ),
    "glm45": Recipe(
        Objective(adv.centered, ratios.none, regions.reinforce, partial(aggregation.group_token_mean, group_size=8)),
        "GLM-4.5 (arXiv:2508.06471), section 3.2, by secondary notes",
        group_size=8,
        max_new_tokens=65536,
        note="no KL; one stage at 64K; token-weighted mean as in its code RL; temperature and difficulty follow the "
        "run (controllers, filters); group size not known: 8 here",
    ),
    "glm4_9b_slime": _SLIME,
    "glm47_slime": replace(
        _SLIME,
        objective=replace(
            _GRPO,
            ratio=ratios.sequence,
            region=partial(regions.clip, low=1e-4, high=2e-4),
            weight=partial(weights.truncated, cap=2.0),
        ),
        source="THUDM/slime, scripts of GLM-4.7 of August 2026; lengths of run-glm4.7-30B-A3B.sh",
        prompts=128,
        max_new_tokens=32768,
        temperature=1.0,
        flat_groups="drop",
    ),
    "scalerl": Recipe(
        Objective(
            adv.batch_normalized,
            ratios.token,
            partial(regions.cispo, cap=5.0),
            partial(aggregation.group_token_mean, group_size=16),
        ),
        "ScaleRL (arXiv:2510.13786), sections 2 and 4",
        group_size=16,
        prompts=48,
        max_new_tokens=14336,
        asynchrony=8,
        flat_groups="drop",
        retire_rate=0.9,
        note="12,288 tokens of thought, then it is interrupted, and 2,048 of answer; the head in fp32 on both sides; "
        "rewards are 1 and -1",
    ),
}
