"""The networks that `bench/compile_sweep.py` compiles: a small one of each family of timm, and those with the paper's
blocks.

Deep ones of equal blocks have fewer here: they compile faster and are the same code.
"""

PAPER_BLOCKS = (
    "efficientnetv2_rw_t:group_size=8",
    "efficientnet_b0:group_size=8",
    "convfirst_uir",
    "convfirstnet_pico",
)
CONVOLUTIONAL = (
    *("hrnet_w18_small", "mobileone_s0", "repghostnet_050", "ghostnet_050", "dpn68", "inception_v3", "dla46_c"),
    *("densenet121:block_config=(2,2,2,2)", "res2net50_14w_8s:layers=(1,1,1,1)", "bat_resnext26ts", "botnet26t_256"),
    *("skresnet18", "repvgg_a0", "gernet_s", "regnetx_002", "regnety_002", "regnetz_005", "nf_regnet_b0"),
    *("tf_efficientnetv2_b0", "efficientnet_b0", "efficientnet_lite0", "efficientnet_b0_g8_gn", "mobilenetv2_050"),
    *("mobilenetv3_small_050", "mobilenetv4_conv_small_035", "tinynet_e", "mnasnet_small", "fbnetc_100"),
    *("hardcorenas_a", "rexnet_100", "lcnet_050", "cs3darknet_focus_s", "hgnetv2_b0", "ese_vovnet19b_slim"),
    *("selecsls42", "resnest14d", "resnetblur18", "resnet10t", "repvit_m0_9", "starnet_s050", "mambaout_femto"),
    *("shvit_s1", "convnext_atto", "convnextv2_atto", "inception_next_atto", "convmixer_1024_20_ks9_p14"),
)
WITH_ATTENTION = (
    *("fastvit_t8", "efficientvit_m0", "mobilevit_xxs", "efficientvit_b0", "edgenext_xx_small"),
    *("maxvit_rmlp_pico_rw_256:depths=(1,1,1,1)", "coatnet_pico_rw_224:depths=(1,1,1,1)"),
    *("levit_128s", "efficientformer_l1", "tiny_vit_5m_224", "coat_lite_tiny", "visformer_tiny"),
    *("poolformer_s12", "pvt_v2_b0", "swin_tiny_patch4_window7_224:depths=(1,1,2,1)"),
    *("davit_tiny:depths=(1,1,1,1)", "xcit_nano_12_p16_224:depth=2", "nest_tiny"),
    *("vit_tiny_patch16_224:depth=2", "vit_tiny_r_s16_p8_224:depth=2"),
)
SWEEP = (*PAPER_BLOCKS, *CONVOLUTIONAL, *WITH_ATTENTION)
"""Those that take longest to compile come first, as far as is known: a pool of workers then ends together."""
PREFERRED_SIZE = 96
"""Height = width of the images, in pixels, where a network takes that: stages down to 3 x 3."""
