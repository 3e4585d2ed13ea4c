"""Beginnings of texts in three of mosaic's domains, for traffic that changes its subject."""

DOMAIN_PROMPTS = {
    "english": (
        "Bingley replied that he did, and made his congratulations",
        "The old gentleman came in from the garden, and when he saw her",
        "It was late in the evening, and the whole house was quiet",
        "She had never been to the sea before, and she looked out",
        "My dear sir, said the doctor, there is no reason to be alarmed",
        "In the morning they went down to the river together",
        "He took the letter from the table and read it again",
        "There was a time when nobody in the village would have spoken",
    ),
    "chinese": (
        "大家又说了一回闲话。至晚饭后又往贾母处",
        "宋江听了，大喜，便叫人取酒来",
        "那人笑道：“你不知道，这里头有个缘故",
        "次日一早，众人都到厅上来",
        "宝玉听了这话，心中不觉",
        "只见一个大汉从林子里走出来，手里",
        "且说众好汉在山寨里商议",
        "老太太道：“今儿天气好，不如",
    ),
    "python": (
        "def parse_args(args):\n",
        "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n",
        "def merge(left, right):\n    result = []\n",
        "class Node:\n    def __init__(self, value, parent=None):\n",
        "for name in sorted(names):\n    if name.startswith('_'):\n",
        "    def test_empty(self):\n        self.assertEqual(",
        "try:\n    with open(path) as file:\n",
        'def read_lines(path):\n    """Return the lines of a file."""\n',
    ),
}
