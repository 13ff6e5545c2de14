"""What smalti.core brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    here = "smalti.core"
    backbones = f"{here}.backbones"
    yield Component("encoder", "cnn", f"{backbones}.cnn:CNNEncoderOptions", "residual CNN, halving per level")
    yield Component("encoder", "vqgan", f"{backbones}.vqgan:VQGANEncoderOptions", "VQGAN's CNN and its descendants")
    yield Component(
        "encoder", "simple-cnn", f"{backbones}.simple_cnn:SimpleCNNEncoderOptions", "VQ-VAE's small CNN, factor 4"
    )
    yield Component(
        "encoder",
        "latent-grid-vit",
        f"{backbones}.latent_grid_vit:LatentGridEncoderOptions",
        "ViT with grids of latent tokens (XQ-GAN)",
    )
    yield Component(
        "encoder",
        "pretrained-titok",
        f"{backbones}.pretrained_titok:PretrainedTiTokOptions",
        "TiTok's encoder, started from a pretrained ViT",
    )
    yield Component("encoder", "timm", f"{backbones}.timm_encoder:TimmEncoderOptions", "any ViT of timm")
    yield Component(
        "encoder",
        "transformers",
        f"{backbones}.transformers_encoder:TransformersEncoderOptions",
        "vision towers of transformers, by hub name",
    )
    yield Component("encoder", "titok", f"{backbones}.titok:TiTokEncoderOptions", "ViT to latent tokens (TiTok)")
    yield Component("encoder", "vit-vqgan", f"{backbones}.vit_vqgan:ViTVQGANEncoderOptions", "ViT to a grid")
    yield Component(
        "encoder",
        "branched-vqgan",
        f"{backbones}.branched_vqgan:BranchedVQGANEncoderOptions",
        "VQGAN trunk with an adapter per branch (FQGAN)",
    )
    yield Component("decoder", "cnn", f"{backbones}.cnn:CNNDecoderOptions", "residual CNN, doubling per level")
    yield Component("decoder", "vqgan", f"{backbones}.vqgan:VQGANDecoderOptions", "VQGAN's CNN and its descendants")
    yield Component(
        "decoder", "simple-cnn", f"{backbones}.simple_cnn:SimpleCNNDecoderOptions", "VQ-VAE's small CNN, factor 4"
    )
    yield Component(
        "decoder",
        "latent-grid-vit",
        f"{backbones}.latent_grid_vit:LatentGridDecoderOptions",
        "ViT from a latent grid to pixels (XQ-GAN)",
    )
    yield Component(
        "decoder", "token-cnn", f"{backbones}.token_cnn:TokenCNNDecoderOptions", "CNN from latent tokens to pixels"
    )
    yield Component("decoder", "titok", f"{backbones}.titok:TiTokDecoderOptions", "ViT from latent tokens (TiTok)")
    yield Component("decoder", "vit-vqgan", f"{backbones}.vit_vqgan:ViTVQGANDecoderOptions", "ViT to pixels")
    yield Component(
        "decoder", "text-titok", f"{backbones}.text_titok:TextTiTokDecoderOptions", "TiTok's, which reads a text"
    )
    yield Component("tokenizer", "composed", f"{here}.tokenizer:ComposedOptions", "encoder + quantizer + decoder")
    yield Component(
        "tokenizer",
        "published",
        f"{here}.published_tokenizer:PublishedTokenizerOptions",
        "trained elsewhere, with its weights",
    )
    yield Component(
        "tokenizer",
        "feature-predicting",
        f"{here}.feature_prediction:FeaturePredictingOptions",
        "composed, with heads that predict a teacher's features",
    )
    yield Component("autoencoder", "composed", f"{here}.autoencoder:ComposedAutoencoderOptions", "encoder + decoder")
    losses = f"{here}.losses"
    yield Component("loss", "l1", f"{losses}.pixel:L1Options", "mean absolute difference")
    yield Component("loss", "l2", f"{losses}.pixel:L2Options", "mean squared difference")
    yield Component("loss", "charbonnier", f"{losses}.pixel:CharbonnierOptions", "smooth mean absolute difference")
    yield Component("loss", "lpips", f"{losses}.lpips:LPIPSOptions", "LPIPS with VGG16")
    yield Component("loss", "perceptual", f"{losses}.perceptual:PerceptualOptions", "logits of an ImageNet classifier")
    yield Component("loss", "gram", f"{losses}.gram:GramOptions", "Gram matrices of VGG16's features")
    yield Component("loss", "alignment", f"{losses}.alignment:AlignmentOptions", "latent near DINOv2 or CLIP")
    yield Component("loss", "dependency", f"{losses}.dependency:DependencyOptions", "cosine of two branches (XQ-GAN)")
    yield Component(
        "loss", "proxy-codes", f"{losses}.proxy_codes:ProxyCodesOptions", "another tokenizer's tokens (TiTok)"
    )
    judges = f"{here}.discriminators"
    yield Component("discriminator", "patchgan", f"{judges}.patchgan:PatchGANOptions", "logits per image patch")
    yield Component("discriminator", "stylegan", f"{judges}.stylegan:StyleGANOptions", "residual, one logit per image")
    yield Component("discriminator", "titok", f"{judges}.titok:TiTokDiscriminatorOptions", "blur-pooling, of MaskBit")
    yield Component("discriminator", "dino", f"{judges}.dino:DINODiscriminatorOptions", "heads on a frozen DINO")
    data = f"{here}.data"
    yield Component("dataset", "webdataset", f"{data}.webdataset:WebDatasetOptions", "WebDataset tar shards")
    yield Component("dataset", "folder", f"{data}.folders:FolderOptions", "image files in folders")
    yield Component("dataset", "imagenet", f"{data}.folders:ImageNetOptions", "ImageNet's folders")
    yield Component("dataset", "list", f"{data}.listings:ListOptions", "txt, csv, json or jsonl of paths")
    yield Component("dataset", "mini-imagenet", f"{data}.listings:MiniImageNetOptions", "images/ and tables")
    yield Component("dataset", "cifar10", f"{data}.cifar:CIFAR10Options", "CIFAR-10's Python batches")
    yield Component("dataset", "cifar100", f"{data}.cifar:CIFAR100Options", "CIFAR-100's Python batches")
    yield Component("dataset", "celeba", f"{data}.celeba:CelebAOptions", "aligned CelebA and its split file")
    yield Component("dataset", "huggingface", f"{data}.arrow:HuggingFaceOptions", "Arrow files of datasets")
    layouts = f"{here}.checkpoints.layouts"
    yield Component("checkpoint", "llamagen-vq", f"{layouts}.llamagen:LlamaGenLayout", "LlamaGen's tokenizers")
    yield Component("checkpoint", "xqgan-cnn", f"{layouts}.llamagen:XQGANConvolutionalLayout", "XQ-GAN between CNNs")
    yield Component("checkpoint", "taming-vqgan", f"{layouts}.taming:TamingLayout", "VQGAN of taming-transformers")
    yield Component("checkpoint", "ibq", f"{layouts}.taming:IBQLayout", "IBQ's tokenizers of SEED-Voken")
    yield Component("checkpoint", "var-vqvae", f"{layouts}.taming:VARLayout", "VAR's multi-scale VQVAE")
    yield Component("checkpoint", "open-magvit2", f"{layouts}.open_magvit2:OpenMAGVIT2Layout", "Open-MAGVIT2's images")
    yield Component("checkpoint", "maskgit-vqgan", f"{layouts}.maskgit_vqgan:MaskGITVQGANLayout", "MaskGIT's VQGAN")
    yield Component("checkpoint", "vistok-vqvae", f"{layouts}.vistok:VistokSimpleLayout", "visual-tokenizer-pytorch")
    yield Component("checkpoint", "vistok-vqgan", f"{layouts}.vistok:VistokVQGANLayout", "visual-tokenizer-pytorch")
    yield Component(
        "checkpoint",
        "xqgan-vit",
        f"{layouts}.xqgan_vit:XQGANViT",
        "XQ-GAN, ImageFolder and RobustTok between vision transformers",
    )
    yield Component(
        "checkpoint",
        "1d-pretrained",
        f"{layouts}.pretrained_1d:PretrainedStart",
        "1-D tokenizer, encoder started from MAE, CLIP, DINO, DINOv2 or Depth-Anything v2",
    )
    yield Component(
        "checkpoint",
        "1d-plain",
        f"{layouts}.pretrained_1d:PlainStart",
        "1-D tokenizer, plain transformer encoder and CNN decoder",
    )
    yield Component(
        "checkpoint", "vistok-titok", f"{layouts}.vistok_vit:VistokTiTokLayout", "visual-tokenizer-pytorch, TiTok"
    )
    yield Component(
        "checkpoint",
        "vistok-vit-vqgan",
        f"{layouts}.vistok_vit:VistokViTVQGANLayout",
        "visual-tokenizer-pytorch, ViT-VQGAN",
    )
    yield Component("checkpoint", "titok", f"{layouts}.titok:TiTokLayout", "TiTok and TA-TiTok")
    yield Component("checkpoint", "fqgan", f"{layouts}.fqgan:FQGAN", "FQGAN, dual and triple")
    yield Component(
        "checkpoint",
        "fqgan-with-feature-heads",
        f"{layouts}.fqgan:FQGANWithFeatureHeads",
        "FQGAN with its heads for training",
    )
    yield Component("zoo", "smalti", f"{here}.zoo", "published models that smalti knows")
    yield Component("recipes", "smalti", f"{here}.recipes", "the recipes that come with smalti")
