"""Cards of pairs: true to the pair, kept through saving and loading, never over a user's own; and the upload."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from cosup import cards
from cosup.model import GenCtxModel
from cosup.train import CoSupConfig, CoSupTrainer
from pairs import pair, shared
from tiny import tiny_folder, tiny_gen, tiny_instances, tiny_passages

INSTANCES, PASSAGES = tiny_instances(8), tiny_passages(8)


def facts_of(folder: Path) -> dict:
    """As the hub reads them."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def trained(folder: Path, **options) -> CoSupTrainer:
    args = CoSupConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
                       max_steps=2, report_to="none", **options)  # fmt: skip
    return CoSupTrainer(pair(), args, train_dataset=INSTANCES, passages=PASSAGES, eval_dataset=INSTANCES)


def test_a_card_says_what_the_pair_is_and_no_more(tmp_path):
    model = pair(pooling="token", temperature=0.25)
    model.save_pretrained(tmp_path)
    facts, text = facts_of(tmp_path), card_of(tmp_path)
    assert facts["library_name"] == "cosup" and facts["pipeline_tag"] == "text-generation" and "cosup" in facts["tags"]
    assert not {"base_model", "training", "license"} & set(facts)  # not known
    assert "## Training" not in text
    assert f"| Gen | LlamaForCausalLM | {model.gen.num_parameters():,} |" in text
    assert f"| Ctx | BertModel | {model.ctx.num_parameters():,} |" in text
    assert "| `pooling` | `token` |" in text and "| `temperature` | `0.25` |" in text


def test_a_pair_of_shared_weights_has_one_part(tmp_path):
    shared(tiny_gen()).save_pretrained(tmp_path)
    assert "| Gen | " in card_of(tmp_path) and "| Ctx | " not in card_of(tmp_path)


def test_hub_ids_are_base_models_and_folders_are_not(tmp_path, monkeypatch):
    gen = tiny_gen()
    gen.name_or_path = "owner/small-gen"  # as transformers sets it
    model = shared(gen)
    model.save_pretrained(tmp_path / "first")
    again = GenCtxModel.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        assert facts_of(tmp_path / name)["base_model"] == ["owner/small-gen"]
    tiny_folder(tmp_path / "gen", tiny_gen())
    monkeypatch.chdir(tmp_path)
    of_folder = GenCtxModel.from_pretrained("gen")  # it could be a hub id, too
    assert of_folder.gen.name_or_path == "gen"
    of_folder.save_pretrained(tmp_path / "third")
    assert "base_model" not in facts_of(tmp_path / "third")


def test_the_trainers_figures_are_those_it_logged_last(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    assert "## Training" not in card_of(tmp_path)  # nothing before the first step
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log][-1]
    logged |= trainer.evaluate()
    trainer.save_model()
    training = facts_of(tmp_path)["training"]
    assert (training["steps"], training["instances"], training["passages"]) == (2, 8, 8)
    names = ["loss", "ntp_loss", "nsp_loss", "retrieval_accuracy"]
    names += [f"eval_{name}" for name in names]
    assert set(training) == {"steps", "instances", "passages", *names}
    assert {name: training[name] for name in names} == {name: logged[name] for name in names}
    assert f"| `nsp_loss` | {logged['nsp_loss']:.4g} |" in card_of(tmp_path)

    before = card_of(tmp_path)
    GenCtxModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert card_of(tmp_path / "again") == before


def test_a_users_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    model = pair()
    model.save_pretrained(tmp_path)
    GenCtxModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert card_of(tmp_path) == "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "README.md").unlink()
    model.save_pretrained(tmp_path)
    edited = card_of(tmp_path).replace(cards.MARKER, "Ours, edited.")  # the marker makes it cosup's
    (tmp_path / "README.md").write_text(edited)
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path) == edited


def test_a_card_of_ours_follows_the_pair(tmp_path):
    pair(pooling="last").save_pretrained(tmp_path)
    pair(pooling="token").save_pretrained(tmp_path)
    assert "`token`" in card_of(tmp_path) and "| `last` |" not in card_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "no facts", "---\n[broken\n---\n", "---\n- a list\n---\n", "---\nbase_model: 3\ntraining: true\n---\n"]
)
def test_a_pair_loads_beside_any_card(text, tmp_path):
    pair().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(text)
    model = GenCtxModel.from_pretrained(tmp_path)
    assert model.base_models == [] and model.training_figures == {}


def test_one_base_model_may_stand_alone_in_a_users_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: owner/one\n---\n")
    assert cards.read(tmp_path) == (["owner/one"], {})


def test_transformers_own_card_is_not_written_over_the_pairs(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    before = card_of(tmp_path)
    trainer.create_model_card(model_name="pair", tags=["other"])
    assert card_of(tmp_path) == before


def test_a_bar_stays_in_its_cell():
    assert cards.table(("a", "b"), [("x|y", 1)]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"


# ---- to the hub; nothing is sent


@pytest.fixture
def hub(monkeypatch):
    """What huggingface_hub was asked to do; a folder's files while they are there."""
    asked = {}

    def create_repo(repo_id, **options):
        asked["create"] = (repo_id, options)
        return SimpleNamespace(repo_id=f"owner/{repo_id.split('/')[-1]}")

    def upload_folder(*, folder_path, **options):
        again = GenCtxModel.from_pretrained(folder_path)
        asked["upload"] = (options, again.fingerprint(), yaml.safe_load(card_of(Path(folder_path)).split("---")[1]))
        return "the commit"

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return asked


def test_a_pushed_pair_is_the_saved_pair_with_its_card(hub):
    model = pair()
    said = model.push_to_hub("owner/pair", private=True, token="t", commit_message="first", revision="main")
    assert said == "the commit"
    assert hub["create"] == ("owner/pair", {"private": True, "token": "t", "exist_ok": True})
    options, fingerprint, facts = hub["upload"]
    assert options == {"repo_id": "owner/pair", "token": "t", "commit_message": "first", "revision": "main"}
    assert fingerprint == model.fingerprint() and facts["library_name"] == "cosup"


def test_a_name_alone_is_the_users_own_repository(hub):
    pair().push_to_hub("pair")
    assert hub["upload"][0]["repo_id"] == "owner/pair"


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "owner/two words", "-pair", 7])
def test_a_repo_id_that_is_none_is_told_before_anything_is_done(repo_id, hub):
    with pytest.raises(ValueError, match="repo_id: wanted the owner/name of a repository, got "):
        pair().push_to_hub(repo_id)
    assert not hub
