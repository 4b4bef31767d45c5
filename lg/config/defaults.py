"""Every config key with its default, meaning, unit and range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

# None (null in YAML) means "not set". Keys marked (+) are new in this project. All others keep the
# names and defaults of the published code, so that its configs load unchanged.
DEFAULTS: dict[str, Any] = {
    "MODEL": {
        # DeiT, T2TViT, PiT, PVT, PVTv2, ConViT, CvT, ResNet, or timm/NAME for any timm model
        "TYPE": "ResNet",
        "IMG_SIZE": 224,  # side of the square input image, pixels
        # image channels. 3: RGB; 1: gray, with up to 16 bits. Images of every data set are
        # converted to it
        "IN_CHANNELS": 3,
        "NUM_CLASSES": 100,  # must equal the number of classes of the data set
        "LOSS_FUN": "cross_entropy",  # cross_entropy
        # (+) initial weights. default: the family's own; mimetic: attention weights and position
        # embeddings with the structure of trained ones (DeiT, T2TViT, PiT, timm/NAME with plain
        # attention)
        "INIT": "default",
        # (+) timm/NAME only: module names (or shell patterns) of the blocks, for models whose
        # blocks are not found automatically
        "BLOCKS": [],
        # (+) timm/NAME only: path or URL of published weights to start from; the classifier starts
        # fresh if its number of classes differs
        "PRETRAINED": "",
    },
    "CNN": {  # the CNN guide, or the model itself if MODEL.TYPE is ResNet
        "DEPTH": 56,  # 6n+2: CIFAR form; 18, 34, 50, 101, 152: ImageNet form
        "ACTIVATION_FUN": "relu",  # an activation name in timm
        "ACTIVATION_INPLACE": True,  # saves memory; same results
        "BN_EPS": 1e-5,  # > 0
        "BN_MOMENTUM": 0.1,  # (0, 1]
        "ZERO_INIT_FINAL_BN_GAMMA": False,  # start each residual branch at zero
    },
    "RESNET": {
        # basic_transform | bottleneck_transform (ImageNet depths >= 50)
        "TRANS_FUN": "basic_transform",
        "NUM_GROUPS": 1,  # groups of the 3x3 convolution (bottleneck only)
        "WIDTH_PER_GROUP": 64,  # channels per group in the first stage (bottleneck only)
        "STRIDE_1X1": True,  # bottleneck: stride on the first 1x1 instead of the 3x3 convolution
    },
    # Hierarchical families take lists with one entry per stage, the others single numbers.
    "TRANSFORMER": {
        "PATCH_SIZE": None,  # pixels
        "PATCH_STRIDE": None,  # pixels
        "PATCH_PADDING": None,  # pixels
        "HIDDEN_DIM": None,  # channels
        "DEPTH": None,  # number of blocks
        "NUM_HEADS": None,  # must divide HIDDEN_DIM
        "MLP_RATIO": None,  # hidden width of the MLP over HIDDEN_DIM
        "LN_EPS": 1e-6,  # > 0
        "DROP_RATE": None,  # dropout of tokens, attention output and MLP, [0, 1)
        "DROP_PATH_RATE": None,  # stochastic depth of the last block, [0, 1)
        "ATTENTION_DROP_RATE": None,  # dropout of attention weights, [0, 1)
        # (+) DeiT and T2TViT, more channels at the end (arXiv 2511.15572), one of the two:
        "WIDE_LAST": 0,  # channels of the last block, above HIDDEN_DIM; 0: as the others
        "LIFT": 0,  # channels to which a projection after the last block lifts the tokens; 0: none
    },
    "T2T": {"TOKEN_DIM": 64, "KERNEL_SIZE": [7, 3, 3], "STRIDE": [4, 2, 2], "PADDING": [2, 1, 1]},
    "PIT": {"STRIDE": 8},  # stride of the patch convolution, pixels
    "PVT": {"SR_RATIO": [8, 4, 2, 1]},  # spatial reduction of keys and values, per stage
    "CONVIT": {
        "LOCAL_LAYERS": 10,  # number of gated blocks, before the class token is added
        "LOCALITY_STRENGTH": 1.0,  # initial focus of the gated blocks, > 0
    },
    "CVT": {  # one entry per stage
        "WITH_CLS_TOKEN": [False, False, True],
        "QKV_PROJ_METHOD": ["dw_bn", "dw_bn", "dw_bn"],  # dw_bn | avg | linear
        "KERNEL_QKV": [3, 3, 3],
        "STRIDE_KV": [2, 2, 2],
        "STRIDE_Q": [1, 1, 1],
        "PADDING_KV": [1, 1, 1],
        "PADDING_Q": [1, 1, 1],
    },
    "DISTILLATION": {
        "ENABLE_INTER": False,  # imitate the guide's feature maps
        # what is compared. linear: the maps, after 1x1 convolution heads; (+) gram: Gram matrices
        # of their channels, after such heads; attention: maps of spatial attention; similarity:
        # similarities between the images of a batch
        "INTER_TRANSFORM": "linear",
        "INTER_LOSS": "l2",  # l2
        "INTER_TEACHER_INDEX": [],  # ResNet stages (or timm blocks), counted from 0
        # student blocks, counted across all stages from 0; paired with INTER_TEACHER_INDEX. (+)
        # mix: each guide stage is imitated by a learned mixture of all blocks (linear, gram)
        "INTER_STUDENT_INDEX": [],
        "INTER_WEIGHT": 2.5,  # factor of the summed imitation losses, >= 0
        # imitate the guide's logits: DeiT with its distillation token, all others with their
        # classifier
        "ENABLE_LOGIT": False,
        # soft: KL divergence at LOGIT_TEMP, times LOGIT_TEMP^2; hard: cross-entropy with the
        # guide's predicted class
        "LOGIT_LOSS": "soft",
        "LOGIT_TEMP": 1.0,  # > 0
        # (+) soft: imitate z-scores, the logits of an image minus their mean over their standard
        # deviation
        "LOGIT_STANDARDIZE": False,
        # weight of the logit loss; the classification loss gets 1 - LOGIT_WEIGHT, [0, 1]
        "LOGIT_WEIGHT": 0.5,
        # (+) factor of the guidance terms; once it is 0, the guide does not run. static: 1; until:
        # 1 in the first SCHEDULE_EPOCH epochs, then 0; decay_linear, decay_cosine: from 1 to 0 at
        # SCHEDULE_EPOCH; adaptive: 1 until the slope of the imitation loss has risen to
        # ADAPTIVE_THRESHOLD, then 0; loss and slope (per epoch) are means over ADAPTIVE_WINDOW
        # epochs
        "SCHEDULE": "static",
        "SCHEDULE_EPOCH": 0,  # (+) until: 1 to MAX_EPOCH - 1; decay: up to MAX_EPOCH; 0: MAX_EPOCH
        # (+) adaptive, epochs. If MAX_EPOCH is below 300: x MAX_EPOCH / 300, rounded down, >= 1
        "ADAPTIVE_WINDOW": 50,
        # (+) adaptive, loss per epoch, < 0. If MAX_EPOCH is below 300: x 300 / MAX_EPOCH
        "ADAPTIVE_THRESHOLD": -0.02,
        "TEACHER_MODEL": "ResNet",  # ResNet (set by CNN.* and RESNET.*) | timm/NAME
        "TEACHER_WEIGHTS": None,  # path or URL of the trained guide; required for training
        "TEACHER_IMG_SIZE": 32,  # side to which the student's images are resized, pixels
        # (+) BatchNorm of the guide. eval: running statistics; batch: statistics of the batch, as
        # in the published runs
        "TEACHER_BN": "eval",
        "OFFLINE": False,  # use stored guide features instead of running the guide
        "FEATURE_FILE": None,  # folder of stored features, written by precompute_feature.py
        # (+) file: read each batch from the file; device: copy all features to the GPU (or memory)
        # at the start
        "FEATURE_PLACE": "file",
    },
    "OPTIM": {
        # sgd | adam | adamw | (+) muon | nadamuon (matrices; all other parameters: AdamW or NAdamW)
        "OPTIMIZER": "sgd",
        "BASE_LR": 0.1,  # learning rate after warm-up, > 0
        "MIN_LR": 0.0,  # final learning rate of cos, lin and exp, [0, BASE_LR]; exp needs > 0
        "HEAD_LR_RATIO": 1.0,  # learning rate of the classifier over that of the body, > 0
        "LR_POLICY": "cos",  # cos | lin | exp | steps; updated once per epoch
        "STEPS": [],  # epochs at which `steps` multiplies the learning rate by LR_MULT
        "LR_MULT": 0.1,  # (0, 1]
        "MAX_EPOCH": 200,  # >= 1
        "MOMENTUM": 0.9,  # sgd, muon, nadamuon, [0, 1)
        "DAMPENING": 0.0,  # sgd, [0, 1]
        "NESTEROV": True,  # sgd; needs MOMENTUM > 0 and DAMPENING 0
        "BETA1": 0.9,  # adam, adamw, muon, nadamuon, [0, 1)
        "BETA2": 0.999,  # adam, adamw, muon, nadamuon, [0, 1)
        "WEIGHT_DECAY": 5e-4,  # not applied to biases, norms, tokens and position embeddings, >= 0
        "WARMUP_FACTOR": 0.1,  # learning rate of epoch 0 over BASE_LR if WARMUP_EPOCHS > 0, (0, 1]
        "WARMUP_EPOCHS": 0,  # length of the linear warm-up, epochs
        # exponential moving average of the weights: its update rate is this times BATCH_SIZE /
        # MAX_EPOCH * EMA_UPDATE_PERIOD, at most 1; >= 0
        "EMA_ALPHA": 1e-5,
        "EMA_UPDATE_PERIOD": 0,  # optimiser steps between updates of the average; 0: no average
        "CLIP_GRAD_NORM": 0.0,  # (+) maximum L2 norm of the whole gradient; 0: no clipping
    },
    "TRAIN": {
        "DATASET": "",  # digits, cifar100, flowers, tiny_imagenet, chaoyang, image_folder
        "SPLIT": "train",
        "BATCH_SIZE": 128,  # images per optimiser step, over all processes
        "AUTO_RESUME": True,  # resume from the last checkpoint in OUT_DIR
        "RESUME_CHANGED": False,  # (+) resume even if settings or images changed
        "WEIGHTS": "",  # path or URL of weights to start from
        # True: bf16 if the hardware computes in it; if not, GPUs use fp16 with loss scaling, CPUs
        # fp32
        "MIXED_PRECISION": False,
        "LABEL_SMOOTHING": 0.0,  # [0, 1)
        # alpha of Beta(alpha, alpha), >= 0; 0: off. If CutMix is on as well, one of the two is
        # drawn for each batch
        "MIXUP_ALPHA": 0.0,
        "CUTMIX_ALPHA": 0.0,  # alpha of Beta(alpha, alpha), >= 0; 0: off
        # True: random resized crop, RandAugment, random erasing; False: padded crop
        "STRONG_AUGMENTATION": True,
        "AMP_DTYPE": "auto",  # (+) auto | bf16 | fp16; needs MIXED_PRECISION
        # (+) none, or the mode in which torch.compile compiles student and guide: default |
        # reduce-overhead | max-autotune (the last two use CUDA graphs on GPUs). Compiling delays
        # the first step. max-autotune may choose other kernels at each start, so resuming is not
        # bit-exact
        "COMPILE": "none",
        # (+) keep freed memory for the next step: on CPUs, hierarchical models train up to 1.7
        # times as fast, with up to 20 % more memory (Linux)
        "REUSE_MEMORY": True,
        # (+) round the inputs of float32 matrix products and convolutions, including those of
        # image resizing, to TF32 on hardware that supports it: faster, with 10 instead of 23 bits
        # of mantissa
        "TF32": False,
        # (+) use only operations that give the same bits each time: slower, for bit-exact resume
        # on GPUs; needs CUDNN.BENCHMARK False. CPUs are bit-exact without it
        "DETERMINISTIC": False,
        # (+) file that lists training images to leave out: CSV with the column image, or a path per
        # line, relative to DATA_LOADER.ROOT; --mode doctor --copies writes one. Empty: none
        "EXCLUDE": "",
        # (+) fraction of the training set to use, stratified by class, (0, 1]
        "FRACTION": 1.0,
        # (+) fraction of the training images (after FRACTION) to hold out, stratified by class,
        # [0, 1). They choose the best epoch, and the test set is tested once, at the end. 0: the
        # test set chooses the best epoch, as in the published runs
        # (of an image_folder with val/ and test/, val/ chooses and test/ is tested at the end)
        "VAL_FRACTION": 0.0,
        # (+) seed that selects the images of FRACTION and VAL_FRACTION, whatever RNG_SEED is; >= 0
        "SPLIT_SEED": 1,
        # (+) tests in a row without a lower error after which training stops, >= 0; 0: never. Needs
        # VAL_FRACTION, or an image_folder with val/ and test/
        "EARLY_STOP": 0,
        # (+) fraction of its patches that each training image drops, [0, 1): faster steps.
        # Guidance compares the positions that are left (DeiT, T2TViT, timm's VisionTransformer)
        "PATCH_DROP": 0.0,
        # (+) classes of unequal size. none; weights: weight the cross-entropy of an image by the
        # inverse size of its class, 1 on average over the images; sampling: draw the images of an
        # epoch with replacement, each class equally often on average
        "BALANCE": "none",
        # (+) micro-batches per batch, to save memory; must divide BATCH_SIZE
        "ACCUM_STEPS": 1,
        # (+) several GPUs: BatchNorm uses the statistics of the whole batch, not of each process's
        # share; every BatchNorm then waits for all processes
        "SYNC_BN": False,
        # (+) how images that are not square become square. squash: the aspect ratio changes;
        # letterbox: it is kept, with borders of the mean colour; crop: it is kept, and the central
        # square is used. STRONG_AUGMENTATION then takes its crops from the square
        "RESIZE": "squash",
        "HFLIP": 0.5,  # (+) probability of a horizontal flip, [0, 1]; use 0 for digits or letters
        "KEEP_CHECKPOINTS": 2,  # (+) number of latest checkpoints to keep, >= 1
    },
    "TEST": {
        "DATASET": "",  # as TRAIN.DATASET; empty: the same as TRAIN.DATASET
        "SPLIT": "val",  # val | test | train; val and test are the same if a set has only one
        "BATCH_SIZE": 200,  # over all processes
        "WEIGHTS": "",  # path or URL, for --mode test
        "RESIZE": "",  # (+) as TRAIN.RESIZE, for tests and prediction; empty: the same
        "PERIOD": 1,  # (+) epochs between tests in training; the last epoch is always tested
        "PER_CLASS": False,  # (+) --mode test also prints the accuracy per class
    },
    "DATA_LOADER": {
        # processes that read and augment images (0: none), or threads that decode them (at least
        # 1); limited to the number of CPU cores
        "NUM_WORKERS": 8,
        # (+) workers: processes read and augment images; device: images are decoded once, kept in
        # memory, and augmented on the training device; auto: device if the images fit. The images
        # are the same (on a GPU, up to rounding)
        "BACKEND": "auto",
        # (+) unreadable images. stop: the first one ends the run, with its path in the error; skip:
        # all images are checked at the start, and unreadable ones are left out with a warning
        "ON_ERROR": "stop",
        # (+) seconds to wait for images from processes or threads before the run ends with an
        # error; 0: no limit
        "TIMEOUT": 600,
        "PIN_MEMORY": True,  # page-locked batches, for faster copies to a GPU
        # (+) folder of the data sets; image_folder: the folder with train/ and test/ or val/
        "ROOT": "data",
        # (+) mean and standard deviation that normalise inputs. imagenet: ImageNet's; auto: of the
        # training images, which checkpoints keep; values: MEAN and STD
        "NORMALIZE": "imagenet",
        # (+) one number per channel, for pixels from 0 to 1; training fills in those of auto
        "MEAN": [],
        "STD": [],  # (+) likewise, > 0
        # (+) gray images: [low, high], the numbers in the files that become black and white, others
        # are clipped; []: the whole range of 8 or 16 bits
        "WINDOW": [],
        "DOWNLOAD": True,  # (+) download a missing data set (cifar100, flowers)
    },
    # choose the fastest convolution algorithms by timing; faster, not bit-reproducible on GPUs
    "CUDNN": {"BENCHMARK": True},
    "PREC_TIME": {"WARMUP_ITER": 3, "NUM_ITER": 30},  # --mode time: untimed and timed steps
    "LAUNCH": {  # cluster jobs, for MODE slurm
        # local: on this machine (also under torchrun); slurm: as a Slurm job; submitit_local: as
        # the same job on this machine, for testing
        "MODE": "local",
        "MAX_RETRY": 3,  # times a job is resubmitted after its time limit, >= 0
        "NAME": "pycls_job",
        "COMMENT": "",
        "CPUS_PER_GPU": 10,  # CPU cores per process, >= 1
        "MEM_PER_GPU": 60,  # GB per process, >= 1
        "PARTITION": "devlab",
        "GPU_TYPE": "volta",  # required feature of the machines; empty: any
        "TIME_LIMIT": 4200,  # minutes, >= 1
        "EMAIL": "",  # address to notify when the job ends; empty: none
    },
    "DESC": "",  # free text, printed at the start
    "VERBOSE": True,  # log the resolved config, the complexity of the model, and the machine
    "NUM_GPUS": 1,  # number of processes, one per GPU
    "MAX_GPUS_PER_NODE": 8,  # processes per machine, >= 1
    "OUT_DIR": None,  # null: work_dirs/<config name>
    "CFG_DEST": "config.yaml",  # file name of the resolved config in OUT_DIR
    "RNG_SEED": 1,  # >= 0
    "LOG_DEST": "stdout",  # stdout: console and OUT_DIR/log.txt; file: only OUT_DIR/log.txt
    "LOG_PERIOD": 10,  # steps between log lines, >= 1
    # (+) training writes results.csv, curves.png, mixture.png (of a learned mixture),
    # train_batch.jpg and confusion_matrix.png to OUT_DIR
    "LOG_PICTURES": True,
    # (+) none, or the tracker that also gets the config and the scalars: wandb | mlflow |
    # trackio, each with the extra of that name and set up by its own environment variables
    "LOG_TRACKER": "none",
    "DIST_BACKEND": "nccl",  # nccl | gloo; processes without a GPU always use gloo
    "HOST": "localhost",  # address at which the processes of one machine connect
    "PORT_RANGE": [10000, 65000],  # ports to try for that, [first, last]
    "DOWNLOAD_CACHE": "/tmp/pycls-download-cache",  # cache folder for files given by URL
    "DEVICE": "auto",  # (+) auto | cpu | cuda | mps
}

# Keys, or their prefixes, that may change when a run resumes: they affect neither training nor what
# the tests measure.
FREE_ON_RESUME = (
    "OUT_DIR",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.BACKEND",
    "DATA_LOADER.TIMEOUT",
    "DATA_LOADER.PIN_MEMORY",
    "DATA_LOADER.DOWNLOAD",
    "TEST.BATCH_SIZE",
    "TEST.WEIGHTS",
    "TEST.PER_CLASS",
    "TRAIN.KEEP_CHECKPOINTS",
    "TRAIN.AUTO_RESUME",
    "TRAIN.RESUME_CHANGED",
    "LOG_",
    "DESC",
    "VERBOSE",
    "LAUNCH.",
    "HOST",
    "PORT_RANGE",
    "PREC_TIME.",
    "DOWNLOAD_CACHE",
    "CFG_DEST",
)


# Keys, or their prefixes, whose change is reported when a run resumes, but not refused: length,
# tests, hardware, precision and places. Any other change makes it another run.
REPORTED_ON_RESUME = (
    "OPTIM.MAX_EPOCH",
    "TRAIN.EARLY_STOP",
    "TEST.PERIOD",
    "DEVICE",
    "NUM_GPUS",
    "DIST_BACKEND",
    "MAX_GPUS_PER_NODE",
    "CUDNN.",
    "TRAIN.COMPILE",
    "TRAIN.MIXED_PRECISION",
    "TRAIN.AMP_DTYPE",
    "TRAIN.TF32",
    "TRAIN.DETERMINISTIC",
    "TRAIN.ACCUM_STEPS",
    "TRAIN.REUSE_MEMORY",
    "DATA_LOADER.ROOT",
    "DATA_LOADER.ON_ERROR",
    "DISTILLATION.TEACHER_WEIGHTS",
    "DISTILLATION.FEATURE_FILE",
    "DISTILLATION.FEATURE_PLACE",
)


# Keys of files and folders: ~ is the home folder.
PATHS = (
    "MODEL.PRETRAINED",
    "DISTILLATION.TEACHER_WEIGHTS",
    "DISTILLATION.FEATURE_FILE",
    "TRAIN.WEIGHTS",
    "TRAIN.EXCLUDE",
    "TEST.WEIGHTS",
    "DATA_LOADER.ROOT",
    "OUT_DIR",
    "DOWNLOAD_CACHE",
)


def is_guided(cfg: CfgNode) -> bool:
    """Return whether a config trains with a guide."""
    return bool(cfg.DISTILLATION.ENABLE_INTER or cfg.DISTILLATION.ENABLE_LOGIT)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("SECTION.KEY", value) for every leaf of a config tree, in order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


DEFAULT_VALUES: dict[str, Any] = dict(flatten(DEFAULTS))
