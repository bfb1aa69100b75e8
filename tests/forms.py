"""The same rows in every form that people have them in. What the project reads is written here by
hand, from the descriptions of the forms."""

import json
import re
import shutil
from pathlib import Path

from data.images import open_image


def class_folders(rows, folder: Path) -> Path:
    """Copies each photograph to folder/<class>/; the class is the solution's."""
    for row in rows:
        name = row.solution.removeprefix("<answer>").removesuffix("</answer>")
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(row.images[0], folder / name)
    return folder


def coco_file(rows, file: Path) -> Path:
    """Rows of boxes in thousandths as an annotation file beside copies of their images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images, categories, annotations = {}, {}, []
    for row in rows:
        path = row.images[0]
        if path not in images:
            width, height = open_image(path).size
            shutil.copy(path, file.parent)
            size = {"width": width, "height": height}
            images[path] = {"id": 100 + len(images), "file_name": path.name, **size}
        name = re.search(r"category '([^']+)'", row.problem)[1]
        category = categories.setdefault(name, {"id": 7 + 2 * len(categories), "name": name})
        entry = images[path]
        for numbers in re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", row.solution):
            x1, y1, x2, y2 = map(int, numbers)
            x, y = x1 * entry["width"] / 1000, y1 * entry["height"] / 1000
            w, h = (x2 - x1) * entry["width"] / 1000, (y2 - y1) * entry["height"] / 1000
            place = {"image_id": entry["id"], "category_id": category["id"]}
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **place, **box})
    content = {"images": list(images.values()), "categories": list(categories.values())}
    file.write_text(json.dumps(content | {"annotations": annotations}))
    return file


def chats(rows) -> dict[str, list[dict]]:
    """The rows as each trainer writes them."""
    plain = [(str(row.images[0]), row.problem, row.solution) for row in rows]
    human = [f"<image>\n{problem}" for _, problem, _ in plain]
    return {
        "llama-factory": [
            {
                "messages": [
                    {"role": "user", "content": said},
                    {"role": "assistant", "content": solution},
                ],
                "images": [image],
            }
            for (image, _, solution), said in zip(plain, human, strict=True)
        ],
        "ms-swift": [
            {
                "messages": [{"role": "user", "content": said}],
                "images": [image],
                "solution": solution,
            }
            for (image, _, solution), said in zip(plain, human, strict=True)
        ],
        "vlm-r1": [
            {
                "image": image,
                "conversations": [
                    {"from": "human", "value": said},
                    {"from": "gpt", "value": solution},
                ],
            }
            for (image, _, solution), said in zip(plain, human, strict=True)
        ],
        "parts": [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": image},
                            {"type": "text", "text": problem},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": solution}]},
                ]
            }
            for image, problem, solution in plain
        ],
    }
