"""One small network of each of timm's families, and what they are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import BackboneConfig
from pipeline.embed import graph, timm_models, weights

FAMILIES = {
    "resnet18.a1_in1k": 64,
    "resnet50_clip.openai": 64,
    "resnetv2_50x1_bit.goog_in21k": 64,
    "densenet121.ra_in1k": 64,
    "vgg11.tv_in1k": 64,
    "inception_v3.tv_in1k": 96,
    "regnety_002.pycls_in1k": 64,
    "efficientnet_b0.ra_in1k": 64,
    "tf_efficientnet_lite0.in1k": 65,
    "tf_efficientnetv2_b0.in1k": 64,
    "mobilenetv3_small_050.lamb_in1k": 64,
    "mobilenetv4_conv_small.e1200_r224_in1k": 64,
    "mobileone_s0.apple_in1k": 64,
    "repvgg_a0.rvgg_in1k": 64,
    "fastvit_t8.apple_in1k": 64,
    "hgnet_tiny.paddle_in1k": 64,
    "nfnet_l0.ra2_in1k": 64,
    "convnext_atto.d2_in1k": 64,
    "convnextv2_tiny.fcmae_ft_in22k_in1k": 64,
    "vit_tiny_patch16_224.augreg_in21k": 64,
    "deit_tiny_distilled_patch16_224.fb_in1k": 64,
    "vit_small_patch14_reg4_dinov2.lvd142m": 56,
    "vit_small_patch16_dinov3.lvd1689m": 64,
    "vit_base_patch16_siglip_224.v2_webli": 64,
    "vit_base_patch16_siglip_gap_224.v2_webli": 64,
    "vit_base_patch16_clip_quickgelu_224.openai": 64,
    "vit_pe_core_tiny_patch16_384.fb": 64,
    "eva02_tiny_patch14_224.mim_in22k": 56,
    "beit_base_patch16_224.in22k_ft_in22k": 64,
    "cait_xxs24_224.fb_dist_in1k": 64,
    "xcit_nano_12_p16_224.fb_in1k": 64,
    "levit_128s.fb_dist_in1k": 224,
    "crossvit_9_240.in1k": 240,
    "coat_tiny.in1k": 64,
    "swin_tiny_patch4_window7_224.ms_in1k": 112,
    "tiny_vit_5m_224.dist_in22k": 64,
    "hiera_tiny_224.mae": 64,
    "caformer_s18.sail_in1k": 64,
    "maxvit_tiny_tf_224.in1k": 224,
    "mixer_b16_224.goog_in21k": 64,
    "edgenext_xx_small.in1k": 64,
    "mobilevit_xxs.cvnets_in1k": 64,
}
"""Tag -> side of the images, which the network has to be able to take."""

FEW: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0.in1k": {},
    "vit_small_patch16_dinov3.lvd1689m": {"depth": 2},
    "convnext_atto.d2_in1k": {},
    "crossvit_9_240.in1k": {},
}
"""Those that every run of the tests looks at, one of fewer blocks: padding as TensorFlow's, a class token, layer norms, and one
that cannot be traced."""

SEED = 3


def compared(tag: str, size: int, **more: Any) -> tuple[float, str, tuple[int, ...]]:
    """Return by how much our feature differs from timm's own (largest difference by largest value), how it was run, and its
    shape for one image.
    """
    network = weights.load_network(
        BackboneConfig(name=f"timm:{tag}", weights="random", arguments={"image_size": size, **more}), SEED
    )
    assert network.preprocessing.size == (size, size)
    images = pictures(size)
    with torch.inference_mode():
        expected = _by_timm(network.architecture, network.arguments, images)
        traced = graph.trace(network.module, images)
        (found,) = graph.cut(traced, graph.resolve(traced, ["penultimate"]))(images)
    assert found.shape == expected.shape
    off = float((found - expected).abs().max() / expected.abs().max())
    return off, "module" if isinstance(traced[0], graph.Taps) else "graph", tuple(found.shape[1:])


def pictures(size: int) -> torch.Tensor:
    """Two images of noise."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(SEED))


def _by_timm(architecture: str, arguments: Any, images: torch.Tensor) -> torch.Tensor:
    """What timm's own network of the same seed gives, built without any of our code but the names of the arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = timms_own(architecture, arguments)
    tokens = model.forward_features(images)
    vectors: torch.Tensor = model.forward_head(tokens, pre_logits=True)
    scores = model.forward_head(tokens)
    torch.testing.assert_close(model(images), scores, rtol=0, atol=0)
    return vectors


def timms_own(architecture: str, arguments: Any, **more: Any) -> nn.Module:
    tag, given = architecture.removeprefix("timm:"), dict(arguments)
    size = given.pop("image_size")
    timm = timm_models.library()
    if timm.get_pretrained_cfg(tag).fixed_input_size:
        given["img_size"] = size
    model: nn.Module = timm.create_model(tag, **given, **more).eval()
    return model
