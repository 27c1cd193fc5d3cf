"""A model trained on one codec's latents is not decoded with another's."""


def test_sampler_refuses_a_checkpoint_of_another_codec(run, stopped_run, tmp_path):
    other = tmp_path / "other"
    run("python", "-m", "wan_model.tiny", other, "--seed", "1")
    video = tmp_path / "video.mp4"
    done = run(
        "wan-infer", "--checkpoint_dir", stopped_run, "--model", other, "--prompts", "A pattern.",
        "--sizes", "96*64", "--frame_nums", "9", "--sample_steps", "2", "--save_file", video, fails=True,
    )  # fmt: skip
    assert "different latent spaces: model_id" in done.stderr
    assert "Traceback" not in done.stderr
    assert not video.exists()


def test_training_refuses_data_of_another_text_encoder(run, dataset, tmp_path):
    done = run(
        "wan-train", "pretrain", "--recipe", "wan_1_3b", f"dataset.path={dataset}", "train.train_iters=1", fails=True
    )
    assert "text embeddings are 32 wide" in done.stderr
