"""Change one constant or boundary of the seven files at a time, in a copy, and see whether a test notices.

python tests/mutate.py                  all of them; prints the survivors, exits with 1 where there is one
python tests/mutate.py gae --jobs 2     those whose file, line or tests hold the word
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  (what is imported here, the forks need not import)
import transformers  # noqa: F401

PROJECT = Path(__file__).parent.parent
SECONDS = 300  # a mutation whose tests take longer counts as noticed

# file: line text (a part that occurs once in the file), its replacement, test files and -k of pytest
MUTATIONS = {
    "rl.py": [
        ('"lr": 3e-7, "kl_coef": 0.05', '"lr": 1e-6, "kl_coef": 0.05', "test_rl.py -k defaults"),
        ('"kl_coef": 0.05, "value_coef": 5.0', '"kl_coef": 0.05, "value_coef": 2.5', "test_rl.py -k defaults"),
        ('{"kl_coef": 0.01} if', '{"kl_coef": 0.05} if', "test_rl.py -k defaults"),
        ("clip: float = flag(0.2", "clip: float = flag(0.3", "test_rl.py -k defaults"),
        ("cap: float = flag(2.0", "cap: float = flag(4.0", "test_rl.py -k defaults"),
        ("ppo_epochs: int = flag(2", "ppo_epochs: int = flag(4", "test_rl.py -k defaults"),
        ("advantage = delta + gamma * lam * next_trace", "advantage = delta + lam * next_trace", "test_rl.py -k gae_"),
        ("rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value", "test_rl.py -k gae_"),
        ("values = values * mask  # V", "values = values * 1  # V", "test_rl.py -k gae_"),
        ("returns = trace * advantages + values", "returns = advantages + values", "test_rl.py -k gae_"),
        ("= values[:, t], trace[:, t]", "= values[:, t], trace[:, t - 1]", "test_rl.py -k gae_"),
        ("groups.std(1, keepdim=True, correction=0)", "groups.std(1, keepdim=True)", "test_rl.py -k group_relative"),
        ('(rho.clamp(max=cap), one)', '(rho.clamp(max=2 * cap), one)', "test_rl.py -k corrections"),
        ('logp_behav if correction == "ratio" else logp_old', "logp_old", "test_rl.py -k corrections"),
        ("rho.clamp(max=1)),", "rho.clamp(max=cap)),", "test_corrections.py -k quadratic"),
        ('"prefix": (rho.cumprod(1), rho)', '"prefix": (rho, rho)', "test_corrections.py -k any_critic"),
        ("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)", "test_rl.py -k clips"),
        ("torch.min(ratio * advantages", "torch.max(ratio * advantages", "test_rl.py -k clips"),
        ("values_old - clip, values_old + clip)", "values_old - clip)", "test_rl.py -k refts_clip"),
        ("torch.max((values - returns) ** 2", "torch.min((values - returns) ** 2", "test_rl.py -k refts_clip"),
        ("return 0.5 * (squared * mask)", "return 1.0 * (squared * mask)", "test_rl.py -k refts_clip"),
        ("LR_RAMP = 10 ", "LR_RAMP = 20 ", "test_rl.py -k minibatches"),
        ("(1 - (step - 1) / config.steps)", "(1 - step / config.steps)", "test_rl.py -k minibatches"),
        ("updates = (step - 1) * config.ppo_epochs * ", "updates = 0 * config.ppo_epochs * ", "test_rl.py -k minibatches"),
        ("torch.randperm(count, generator=generator)", "torch.arange(count)", "test_rl.py -k minibatches"),
        ("for _ in range(config.ppo_epochs):", "for _ in range(1):", "test_rl.py -k minibatches"),
        ("denominator = int(mask[rows].sum())  # of", "denominator = int(mask.sum())  # of", "test_oracles.py -k equations"),
        ("(ratio - 1) * advantages.sign() > config.clip", "(ratio - 1).abs() > config.clip", "test_oracles.py -k equations"),
        ("sum(grad_norms) / len(grad_norms)}  # before", "sum(grad_norms)}  # before", "test_oracles.py -k equations"),
        ('"value_loss": value / tokens', '"value_loss": value', "test_oracles.py -k equations"),
        ("rewards = -config.kl_coef * kl_ref", "rewards = config.kl_coef * kl_ref", "test_oracles.py -k equations"),
        ("rollout.lengths - 2] += end_reward", "rollout.lengths - 3] += end_reward", "test_oracles.py -k equations"),
        ("advantages = whiten(advantages, mask)", "advantages = advantages * mask", "test_oracles.py -k equations"),
        ("loss = pg_loss + config.value_coef * v_loss", "loss = pg_loss + v_loss", "test_rl.py -k value_coef"),
        ("RIDGE * (d / len(mask)) ** 2", "RIDGE * (d / len(mask))", "test_rl.py -k completions_there"),
        ("F.pad(hidden.double(), (0, 1), value=1.0)", "F.pad(hidden.double(), (0, 1), value=0.5)", "test_rl.py -k fit"),
        ("RIDGE = 0.04 ", "RIDGE = 0.08 ", "test_rl.py -k completions_there"),
        ("sum(losses) / len(losses)", "sum(losses)", "test_rl.py -k numbers_of_self"),
        ('"p99": 0.99', '"p99": 0.9', "test_corrections.py -k mismatch"),
        ("move = share * torch.linalg", "move = torch.linalg", "test_rl.py -k fit"),
        ("FIT_SHARE if step > 1 else 1.0", "FIT_SHARE", "test_rl.py -k critic"),
        ("strict=True) if r == 1]", "strict=True) if r > 0]", "test_rl.py -k self_training"),
        ('"accuracy": shares.pop("right")', '"accuracy": 1 - shares.pop("right")', "test_rl.py -k outcome"),
        ("- rollout.prompt_lens).double", "- rollout.prompt_lens - 1).double", "test_rl.py -k outcome"),
        ('numbers["kl_behav"] > 0.05', 'numbers["kl_behav"] > 0.055', "test_rl.py -k far"),
        ('numbers["ess_tokens"] < 0.5', 'numbers["ess_tokens"] < 0.4', "test_rl.py -k far"),
        ("step > 5 and", "step > 6 and", "test_rl.py -k lam_too_short"),
        ("(rho - 1 - log_rho[mask]).mean()", "(rho - log_rho[mask]).mean()", "test_corrections.py -k mismatch"),
        ("-(rho * logp_old[mask]).mean()", "-logp_old[mask].mean()", "test_corrections.py -k mismatch"),
        ("(rho > cap).double()", "(rho >= 1).double()", "test_corrections.py -k mismatch"),
        ("sequence * reward).sum() / sequence.sum()", "sequence * reward).mean()", "test_corrections.py -k mismatch"),
        ("level + 0.5 * min(", "level + 2.0 * min(", "test_corrections.py -k settles"),
        ("return (x * mask).sum() / mask.sum()", "return (x * mask).mean()", "test_rl.py -k whitened"),
        ("residual, target = (returns - values)[mask]", "residual, target = returns[mask]", "test_rl.py -k explained"),
        ("int(mask.sum()) / rollout_seconds", "len(mask) / rollout_seconds", "test_rl.py -k leaves_its_metrics"),
    ],
    "rollout.py": [
        ("right=True).squeeze(-1)", "right=False).squeeze(-1)", "test_rollout.py -k zero"),
        ("(logits / temperature if", "(logits if", "test_oracles.py -k naive_sampler"),
        ("prompt_lens[row] + max_new_tokens)", "prompt_lens[row] + max_new_tokens - 1)", "test_oracles.py -k naive_sampler"),
        ("(seeds[n // num_samples], n % num_samples)", "(seeds[n // num_samples], 0)", "test_oracles.py -k naive_sampler"),
        ("last = lengths[row[:rows], None] - 1", "last = lengths[row[:rows], None] - 2", "test_oracles.py -k naive_sampler"),
        ("longest + max_new_tokens > model", "longest + max_new_tokens >= model", "test_rollout.py -k exactly"),
        ("len(row) + room > most", "len(row) + room >= most", "test_rollout.py -k exactly"),
        ("& (column < lengths[:, None]))[:, 1:]", "& (column <= lengths[:, None]))[:, 1:]", "test_rollout.py -k picture"),
        ('"cut", None, 0.0', '"cut", None, 0.1', "test_rollout.py -k cut_completion"),
        ('"toy-long": 128}.get(self.task, 400)', '"toy-long": 128}.get(self.task, 512)', "test_rl.py -k defaults"),
        ("int = flag(512,", "int = flag(128,", "test_rl.py -k defaults"),
        ("2 if isinstance(error, InputError) else 1", "2", "test_survival.py -k failed_log"),
        ("2 if isinstance(error, InputError) else 1", "1", "test_flags.py -k over_its_warm_up"),
        ('grades.outcomes.count("right")', 'grades.outcomes.count("wrong")', "test_rollout.py -k script_prints"),
    ],
    "warmup.py": [
        ('"batch": 48, "lr": 1e-5', '"batch": 48, "lr": 2e-5', "test_rl.py -k defaults"),
        ('"layer_dropout": 0.0, "epochs": 2.0', '"layer_dropout": 0.0, "epochs": 3.0', "test_rl.py -k defaults"),
        ("micro_batch: int = flag(16", "micro_batch: int = flag(8", "test_rl.py -k defaults"),
        ('"skip_ratio": 0.25}', '"skip_ratio": 0.125}', "test_rl.py -k defaults"),
        ("rng.random() < config.layer_dropout", "rng.random() < 0.2", "test_warmup.py -k layer_dropout"),
        ("round(config.epochs * len", "round(len", "test_warmup.py -k epochs"),
        ("min(1, step / (0.1 * steps)", "min(1, 1 / (0.1 * steps)", "test_warmup.py -k learning_rate"),
        ("(steps + 1 - step) / (0.9 * steps)", "(steps - step) / (0.9 * steps)", "test_warmup.py -k learning_rate"),
        ("if config.eval_every and step %", "if config.eval_every and 1 + step %", "test_warmup.py -k learning_rate"),
        ("(column >= starts[:, None])", "(column > starts[:, None])", "test_warmup.py -k loss_counts"),
        ("loss = -logp.sum() / denominator", "loss = -logp.mean()", "test_warmup.py -k micro_batch_size"),
        ("batch, step * batch)", "batch, step * batch - 1)", "test_warmup.py -k epoch_once"),
        ("BAD_IN_A_ROW = 3 ", "BAD_IN_A_ROW = 2 ", "test_survival.py -k bad_batches and warmup"),
        ("= config.gradient_checkpointing", "= False", "test_survival.py -k checkpointing"),
        ('"weight_decay": 0.0}]', '"weight_decay": weight_decay}]', "test_warmup.py -k decay"),
        ("betas=(0.9, beta2)", "betas=(0.9, 0.9)", "test_warmup.py -k decay"),
        ("self.model.parameters(), 1.0)", "self.model.parameters(), 1e9)", "test_warmup.py -k norm_1"),
        ("due and step < self.last", "due", "test_warmup.py -k on_the_way"),
        ("step % config.save_every == 0", "step % config.save_every == 1", "test_warmup.py -k on_the_way"),
        ("if texts and step % 5 == 1", "if texts and step % 5 == 0", "test_rl.py -k leaves_its_metrics"),
        ("sys.exit(128 + self.stop[0])", "sys.exit(1)", "test_survival.py -k first_signal"),
    ],
    "evaluate.py": [
        ('if name not in FREE | {"seed"}}', "if name not in FREE}", "test_evaluate.py -k one_group"),
        ("majority_is_right(a[i : i + k], r[i : i + k])", "majority_is_right(a, r)", "test_evaluate.py -k in_blocks"),
        ("pass_at_k(samples, sum(r), k)", "pass_at_k(samples, sum(r[:k]), k)", "test_evaluate.py -k in_blocks"),
        ("temperature=0, **sampling", "temperature=1, **sampling", "test_evaluate.py -k in_blocks"),
        ("num_samples=samples, seed=seed, **", "num_samples=samples, temperature=0.5, **", "test_evaluate.py -k in_blocks"),
        ('"greedy_accuracy": shares["right"]', '"greedy_accuracy": 1 - shares["cut"]', "test_evaluate.py -k in_blocks"),
        ("(rollout.lengths - rollout.prompt_lens).double()", "rollout.lengths.double()", "test_evaluate.py -k in_blocks"),
        ("if answer is not None)", "if True)", "test_evaluate.py -k majority"),
        ("1 - math.comb(n - correct, k)", "1 - math.comb(n - correct + 1, k)", "test_evaluate.py -k pass_at_k"),
        ("z, p = 1.96,", "z, p = 1.64,", "test_evaluate.py -k wilson"),
        ("statistics.stdev(known)", "statistics.pstdev(known)", "test_evaluate.py -k cell"),
        ('if outcome == "right"]', "if outcome]", "test_evaluate.py -k kept_once"),
    ],
    "model.py": [
        ("log_mu.exp() * (log_mu - log_pi)", "log_pi.exp() * (log_pi - log_mu)", "test_rollout.py -k exact_over"),
        ("(2 * len(self.layers))", "(1 * len(self.layers))", "test_model.py -k shrunk"),
        ('if name.startswith("value_head") or name', "if name", "test_model.py -k shrunk"),
        ("OPT_OFFSET = 2 ", "OPT_OFFSET = 1 ", "test_model.py -k equal_transformers"),
        ("frequency / (2 * torch.pi)", "frequency / torch.pi", "test_model.py -k equal_transformers"),
        ('("layer", 1e-5) if opt', '("layer", 1e-2) if opt', "test_model.py -k equal_transformers"),
        ("alpha=self.head_dim**-0.5", "alpha=self.head_dim**-0.4", "test_model.py -k cached_equals"),
        ("device) > positions", "device) >= positions", "test_model.py -k cached_equals"),
        ('decoder.autocast = dtype == "bfloat16"', "decoder.autocast = False", "test_survival.py -k reference_gives"),
        ("set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)", "test_distributed.py -k four_processes"),
        ("ru_maxrss * unit / 1e9", "ru_maxrss * unit / 1e6", "test_survival.py -k peak_memory"),
    ],
    "reward.py": [
        ("return 1.0 if right else 0.1", "return 1.0 if right else 0.2", "test_reward.py -k test_markers"),
        ("answer.value != 0 and error", "error", "test_reward.py -k test_numbers"),
        ("Fraction(1, 2 * 10**answer.decimals)", "Fraction(1, 10**answer.decimals)", "test_reward.py -k test_numbers"),
        ("Fraction(1, 100) * min(1,", "Fraction(1, 100) * max(1,", "test_reward.py -k test_numbers"),
        ('"billion": 9', '"billion": 8', "test_reward.py -k test_numbers"),
        ('match["whole"] and over >= under', 'match["whole"] and over > under', "test_reward.py -k test_numbers"),
        ('"toy": (2, 4), "toy-long": (8, 10)}', '"toy": (2, 5), "toy-long": (8, 10)}', "test_reward.py -k what_they_ask"),
        ("0.75 if thing % 2 else 0.25", "0.65 if thing % 2 else 0.35", "test_reward.py -k annotators"),
        ("if len(problems) == limit:", "if len(problems) > limit:", "test_reward.py -k limit_takes"),
    ],
    "sandbox.py": [
        ("abs(right.value) / 10**4", "abs(right.value) / 10**3", "test_sandbox.py -k near_a_whole"),
        ("number.value.denominator > 1 and", "True and", "test_sandbox.py -k near_a_whole"),
        ("MAX_ANSWER = 255 ", "MAX_ANSWER = 250 ", "test_sandbox.py -k small_enough"),
        ("abs(value) < 10**18 and", "abs(value) < 10**9 and", "test_sandbox.py -k kinds"),
    ],
}  # fmt: skip


def run(mutation: tuple[str, ...]) -> tuple[tuple[str, ...], int, str]:
    """The mutation, pytest's exit code and its first failure; in a process of its own, which ends with it."""
    file, old, new, tests = mutation
    tests, _, words = tests.partition(" -k ")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        copy = Path(folder) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".figures"))
        (copy / file).write_text((PROJECT / file).read_text().replace(old, new))
        os.chdir(copy)
        signal.signal(signal.SIGALRM, lambda *_: pytest.exit("too long", 1))
        signal.alarm(SECONDS)
        sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) != PROJECT / "tests")]
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        words = ["-k", words] if words else []
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests.split()), *words])
        signal.alarm(0)
        log.seek(0)
        failed = [line for line in log.read().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return mutation, int(code), failed[0][:110] if failed else ""


def main():
    """Run them, print one line each, then the survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations that hold it")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    every = [(file, *mutation) for file, mutations in MUTATIONS.items() for mutation in mutations]
    chosen = [mutation for mutation in every if any(options.word in part for part in mutation)]
    for file, old, new, _ in chosen:
        count = (PROJECT / file).read_text().count(old)
        if count != 1 or old == new:
            sys.exit(f"{file}: {old!r} stands there {count} times, it must be once; mend the list in {__file__}")
    survivors = []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(options.jobs, maxtasksperchild=1) as pool, contextlib.suppress(KeyboardInterrupt):
        for mutation, code, failed in pool.imap(run, chosen, chunksize=1):
            verdict = {0: "SURVIVED", 1: "caught  "}.get(code, f"NOT RUN, pytest left with {code}")
            print(f"{verdict} {mutation[0]}: {mutation[2]}    {failed}", flush=True)
            survivors += [mutation] if code != 1 else []
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    for file, old, new, tests in survivors:
        print(f"  {file}: {old}  ->  {new}    ({tests})")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
