"""The architectures of `benchmarks.zoo`: timm's families of image classifiers and all of torchvision's.

A word is the name of a model, `NAME@SIZE` is run on images of SIZE x SIZE pixels instead of its own, `NAME:SIZE` is also built for them. A
model runs at its own size, or at 224 px if that is more than 256 px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TIMM_FAMILIES = """
beit_base_patch16_224 botnet26t_256 halo2botnet50ts_256 halonet_h1 haloregnetz_b lambda_resnet26t
sebotnet33ts_256 bat_resnext26ts eca_resnext26ts gcresnext26ts gernet_s mobileone_s1 regnetz_b16 repvgg_a0
resnet50_clip resnet50_mlp resnet51q resnext26ts seresnet33ts cait_xxs24_224 coat_lite_tiny coat_tiny
convit_tiny convmixer_768_32 convnext_atto convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_tiny_240
csatv2@224 cs3darknet_focus_s cs3darknet_s cspdarknet53 cspresnet50 cspnext_tiny davit_tiny
deepseek_vit_412m@224 deit3_small_patch16_224 deit_tiny_distilled_patch16_224 densenet121 densenetblur121d
dla46_c dla60_res2net dpn48b dpn68 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientnet_b0_gn efficientnet_b1_pruned efficientnet_cc_b0_4e efficientnet_lite0 efficientnetv2_rw_t
fbnetc_100 gc_efficientnetv2_rw_t mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035
tf_efficientnetv2_b0 tinynet_e efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0
eva02_tiny_patch14_224 vit_pe_core_tiny_patch16_384:224 vit_small_patch16_dinov3
vit_small_patch16_rope_mixed_224 fasternet_t0 fastvit_mci0 fastvit_sa12 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny gemma4_vit_167m@224 ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny
hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2@224
inception_v3@224 inception_v4@224 lcnetv2_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto
coatnet_pico_rw_224 coatnet_rmlp_nano_rw_224 maxvit_pico_rw_256 maxxvitv2_nano_rw_256 caformer_s18
convformer_s18 poolformer_s12 gmixer_12_224 gmlp_ti16_224 mixer_s16_224 resmlp_12_224 fbnetv3_b lcnet_035
mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenetv5_base mobilevit_xxs
mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap@224 nasnetalarge@224 nest_tiny nextvit_small
eca_nfnet_l0 nf_regnet_b0 nfnet_l0 pit_ti_224 pnasnet5large@224 pvt_v2_b0 qwen3_vit_88m@224 rdnet_tiny
regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m1 res2net50_14w_8s resnest14d ecaresnet26t
resnet10t resnet18 resnet50_gn resnetblur18 resnext50_32x4d seresnet18 resnetv2_18 resnetv2_50d_gn
resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny aimv2_large_patch14_224
vit_base_patch16_siglip_224 vit_small_patch14_dinov2:224 vit_tiny_patch16_224 vit_small_resnet26d_224
vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw
ese_vovnet39b_evos legacy_xception@224 xcit_nano_12_p16_224
"""
"""The smallest member of each family at its published depth and width, in the order of timm's modules: each module of timm.models at least
once, and each really different block inside of the modules that hold many (resnet, byobnet, efficientnet, vision_transformer, ...)."""

TIMM_LARGE = """
resnet152 convnext_base vit_base_patch16_224 swin_base_patch4_window7_224 maxvit_tiny_tf_224 nest_base
"""

TORCHVISION = """
alexnet convnext_base convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1@240 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_v2_m
efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet1_0 mnasnet1_3 mobilenet_v2
mobilenet_v3_large mobilenet_v3_small regnet_x_1_6gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
regnet_y_1_6gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34
resnet50 resnext101_32x8d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_s@256 swin_v2_t@256 vgg11 vgg11_bn
vgg16 vgg16_bn vgg19_bn vit_b_16 vit_b_32 wide_resnet50_2
"""
"""60 of the 80 in `torchvision.models.list_models(module=torchvision.models)`: without the largest of families that are there."""

NUM_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one network is built and fed."""

    name: str
    """The factory, as in an artifact: a timm name or "torchvision.models:name"."""
    kwargs: dict[str, Any]
    size: int | None
    """Height and width of its images in pixels; None: what timm says."""


def timm_architecture(word: str) -> Architecture:
    name, _, built_for = word.partition(":")
    name, _, size = name.partition("@")
    kwargs: dict[str, Any] = {"num_classes": NUM_CLASSES}
    if built_for:
        kwargs["img_size"] = int(built_for)
    return Architecture(name, kwargs, int(size or built_for) if size or built_for else None)


def torchvision_architecture(word: str) -> Architecture:
    name, _, size = word.partition("@")
    slow_to_initialise = name in ("googlenet", "inception_v3")
    kwargs = {"init_weights": False} if slow_to_initialise else {}
    return Architecture(f"torchvision.models:{name}", kwargs, int(size or 224))


def architectures() -> dict[str, Architecture]:
    """All of them by name."""
    found = [timm_architecture(word) for word in (TIMM_FAMILIES + TIMM_LARGE).split()]
    found += [torchvision_architecture(word) for word in TORCHVISION.split()]
    return {architecture.name: architecture for architecture in found}
