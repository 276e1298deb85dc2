"""Which files of a folder or repository are meant, by names as people give them."""

import pytest

from st3_edge import ModelError, demo
from st3_edge.files import choose

LLAVA = ["ggml-model-f16.gguf", "ggml-model-q4_k.gguf", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf"]
MISTRAL = [f"llava-v1.6-mistral-7b.{q}.gguf" for q in ("Q3_K_M", "Q4_K_M", "Q8_0", "Q3_K")] + ["mmproj-model-f16.gguf"]
XTUNER = [f"llava-llama-3-8b-v1_1-{q}.gguf" for q in ("f16", "int4", "mmproj-f16")]
QWEN = [f"Qwen2.5-VL-7B-Instruct-{q}.gguf" for q in ("Q4_K_M", "BF16")] + [
    f"mmproj-Qwen2.5-VL-7B-Instruct-{q}.gguf" for q in ("Q8_0", "f16", "BF16")
]
DOTTED = ["m.i1-Q4_K_M.gguf", "m.mmproj-Q8_0.gguf", "m.mmproj-f16.gguf", "m.imatrix.gguf", "imatrix.gguf"]
SHARDS = [f"Q4_K_M/m-Q4_K_M-{i:05}-of-00002.gguf" for i in (1, 2)] + ["m-Q8_0.gguf", "mmproj-m-f32.gguf"]


@pytest.mark.parametrize(
    ("names", "quant", "model", "mmproj"),
    [
        (LLAVA, "", "ggml-model-q4_k.gguf", "mmproj-model-f16.gguf"),
        (LLAVA, "F16", "ggml-model-f16.gguf", "mmproj-model-f16.gguf"),
        (LLAVA, "q5", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf"),
        (MISTRAL, "", "llava-v1.6-mistral-7b.Q4_K_M.gguf", "mmproj-model-f16.gguf"),
        (MISTRAL, "Q3_K", "llava-v1.6-mistral-7b.Q3_K.gguf", "mmproj-model-f16.gguf"),
        (MISTRAL, "q3_k_m", "llava-v1.6-mistral-7b.Q3_K_M.gguf", "mmproj-model-f16.gguf"),
        (XTUNER, "", "llava-llama-3-8b-v1_1-int4.gguf", "llava-llama-3-8b-v1_1-mmproj-f16.gguf"),
        (QWEN, "", "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf", "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf"),
        (QWEN, "bf16", "Qwen2.5-VL-7B-Instruct-BF16.gguf", "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf"),
        (DOTTED, "", "m.i1-Q4_K_M.gguf", "m.mmproj-f16.gguf"),
        (SHARDS, "", SHARDS[0], "mmproj-m-f32.gguf"),
    ],
)
def test_a_pair_by_its_names(names, quant, model, mmproj):
    # broken if F16 were found in BF16, Q3_K in Q3_K_M, or an mmproj or an imatrix were taken for the model
    models, vision = choose.halves(names)
    assert choose.model(models, quant) == model
    assert choose.half(model, vision)[0] == mmproj


def test_what_is_not_there_is_not_replaced():
    # broken if F16 were given to whoever asked for Q2_K
    models, _ = choose.halves(QWEN)
    assert choose.model(models, "Q2_K") is choose.model(models, "F16") is choose.model([]) is None


def test_the_mmproj_of_the_same_name_in_a_folder_of_several_models():
    # broken if a 13B were given the 7B's vision half
    vision = ["mmproj-llava-v1.5-13b-f16.gguf", "mmproj-llava-v1.5-7b-Q8_0.gguf", "mmproj-llava-v1.6-7b-f16.gguf"]
    assert choose.half("llava-v1.5-7b.Q4_K_M.gguf", vision)[0] == vision[1]
    assert choose.half("llava-v1.5-13b.Q4_K_M.gguf", vision)[0] == vision[0]


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("a/b-Q4_K_M.gguf", "Q4_K_M"),
        ("m.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("m-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("Q8_0/m-00001-of-00002.gguf", "Q8_0"),
        ("model.gguf", ""),
        ("quill-7b.gguf", ""),
    ],
)
def test_the_quantization_that_a_name_tells(name, quant):
    # broken if st3-edge models showed a name that --hf does not take
    assert choose.quant_of(name) == quant


def test_an_mmproj_beside_the_model_is_found_by_what_it_fits(tmp_path):
    # broken if the first by name were taken where another one fits
    model, mmproj = demo.model_paths()
    (tmp_path / "m-Q8_0.gguf").symlink_to(model)
    with pytest.raises(ModelError, match="no mmproj"):
        choose.beside(str(tmp_path / "m-Q8_0.gguf"))
    (tmp_path / "mmproj-m-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / "other-mmproj.gguf").symlink_to(mmproj)
    assert choose.beside(str(tmp_path / "m-Q8_0.gguf")).endswith("other-mmproj.gguf")
    with pytest.raises(ModelError, match="No such file"):
        choose.beside(str(tmp_path / "none.gguf"))


def test_an_mmproj_in_the_place_of_the_model_is_called_so(tmp_path):
    # broken if a person were told to name the very file that is there
    (tmp_path / "mmproj-x.gguf").symlink_to(demo.model_paths()[1])
    with pytest.raises(ModelError, match="is a vision half"):
        choose.beside(str(tmp_path / "mmproj-x.gguf"))
