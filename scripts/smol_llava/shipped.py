"""Write the package's second demo: mmproj, LoRA, and pictures with questions that the pair answers right.

    python scripts/smol_llava/shipped.py --state DIR CHECKPOINT [--scenes 80] [--out st3_edge/data/smol]

Pictures are the first five of the demo scenes, without photographs, whose questions and description the two files
and the package's text model get right with pruning off. Prints how many scenes it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from pathlib import Path

import assets
import smol
from pair import Trained, write_lora, write_mmproj
from pictures import Scene, scene
from talk import answer_right, caption_objects, describe_question, description, questions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from st3_edge import Llava, ST3Config, demo  # noqa: E402

PICTURES, ASKED = 5, 4


def ask(llava: Llava, s: Scene, question: str) -> str:
    """The greedy answer."""
    content = [{"type": "image", "image": s.image}, {"type": "text", "text": question}]
    said = llava.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=160)
    return said["choices"][0]["message"]["content"].strip()


def entry(llava: Llava, s: Scene, number: int, names: list[str]) -> dict | None:
    """What questions.json has of a scene; None where the pair is wrong about it."""
    asked = questions(s, random.Random(f"talk demo {number}"), names, ASKED)
    if len(asked) < ASKED or len({q.kind for q in asked}) < ASKED - 1:
        return None
    if not all(answer_right(ask(llava, s, q.text), q.answer) for q in asked):
        return None
    right, said, there = caption_objects(ask(llava, s, describe_question(random.Random(0))), s, names)
    if not right == said == there:
        return None
    return {"questions": [{"q": q.text, "a": q.answer} for q in asked], "caption": description(s)}


def main() -> None:
    """Parse the command line, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--state", type=Path, default=os.environ.get("ST3_SMOL_STATE"), help="where everything is kept")
    parser.add_argument("--scenes", type=int, default=80, help="to choose among")
    parser.add_argument("--out", type=Path, default=demo.SMOL_FOLDER)
    args = parser.parse_args()
    if not args.state:
        parser.error("name the folder for data and checkpoints: --state DIR")
    a = dataclasses.replace(assets.load(args.state), photos=[])
    args.out.mkdir(parents=True, exist_ok=True)
    trained = Trained(args.checkpoint, args.state)
    write_mmproj(trained, args.out / demo.SMOL_MMPROJ, "Q8_0")
    write_lora(trained, args.out / demo.SMOL_LORA)
    found: list[dict] = []
    files = smol.extract(args.state), args.out / demo.SMOL_MMPROJ
    with Llava(*files, ST3Config(preset="off"), lora=[args.out / demo.SMOL_LORA]) as llava:
        for number in range(args.scenes):
            s = scene(a, number, "demo")
            if of_scene := entry(llava, s, number, a.names):
                found.append({"picture": f"scene-{len(found) + 1}.png", **of_scene})
                s.image.save(args.out / found[-1]["picture"], optimize=True)
                if len(found) == PICTURES:
                    break
    if len(found) < PICTURES:
        raise SystemExit(f"only {len(found)} of {args.scenes} scenes are all right: ask for more with --scenes")
    (args.out / "questions.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"{PICTURES} of {number + 1} scenes, {sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
