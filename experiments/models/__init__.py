"""Networks, one family a file, as Flax modules from inputs to logits."""

from experiments.models.base import Model
from experiments.models.language_model import LanguageModel
from experiments.models.lenet import LeNet5, LeNet300
from experiments.models.mobilenet import MobileNetV1
from experiments.models.resnet import ResNet20, ResNet32, ResNet50, ResNet56, ResNet110
from experiments.models.vgg import VGG16, VGG19
from experiments.models.vit import ViTB16, ViTS16, ViTTi4
from experiments.models.wide_resnet import WRN22x2

MODELS: dict[str, type[Model]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "vgg16": VGG16,
    "vgg19": VGG19,
    "resnet20": ResNet20,
    "resnet32": ResNet32,
    "resnet56": ResNet56,
    "resnet110": ResNet110,
    "wrn22_2": WRN22x2,
    "resnet50": ResNet50,
    "mobilenet_v1": MobileNetV1,
    "vit_ti4": ViTTi4,
    "vit_s16": ViTS16,
    "vit_b16": ViTB16,
    "language_model": LanguageModel,
}
