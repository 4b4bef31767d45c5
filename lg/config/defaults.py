"""Every key of the config tree with its default, its meaning, its unit and its range."""

from __future__ import annotations

from typing import Any

# The tree. `null` (None) means "not set"; the comment gives meaning, unit and range. Keys marked
# (+) are this project's own, the others keep the names and defaults of the published code, so that
# its configs load unchanged.
DEFAULTS: dict[str, Any] = {
    "MODEL": {
        # DeiT, T2TViT, PiT, PVT, PVTv2, ConViT, CvT, ResNet, or timm/NAME for any timm model
        "TYPE": "ResNet",
        "IMG_SIZE": 224,  # side of the square image that the model sees, pixels
        "IN_CHANNELS": 3,  # image channels; the data sets here give 3
        "NUM_CLASSES": 100,  # must equal the class count of the data
        "LOSS_FUN": "cross_entropy",  # cross_entropy
        # (+) timm/NAME only: module names (or shell patterns) of the blocks, when they cannot be
        # found
        "BLOCKS": [],
        # (+) timm/NAME only: path or URL of weights that timm or the model's makers published, to
        # start from; a classifier of another class count starts fresh
        "PRETRAINED": "",
    },
    "CNN": {  # the CNN guide, or the model itself when MODEL.TYPE is ResNet
        "DEPTH": 56,  # 6n+2: the CIFAR form; 18, 34, 50, 101, 152: the ImageNet form
        "ACTIVATION_FUN": "relu",  # any activation that timm knows by name
        "ACTIVATION_INPLACE": True,  # saves memory; same numbers
        "BN_EPS": 1e-5,  # > 0
        "BN_MOMENTUM": 0.1,  # (0, 1]
        "ZERO_INIT_FINAL_BN_GAMMA": False,  # each residual branch starts at zero
    },
    "RESNET": {
        # basic_transform | bottleneck_transform (ImageNet depths >= 50)
        "TRANS_FUN": "basic_transform",
        "NUM_GROUPS": 1,  # groups of the 3x3 convolution (bottleneck only)
        "WIDTH_PER_GROUP": 64,  # channels per group in the first stage (bottleneck only)
        "STRIDE_1X1": True,  # bottleneck: stride on the first 1x1 rather than on the 3x3
    },
    # Lists hold one entry a stage in the hierarchical families, plain numbers serve the others.
    "TRANSFORMER": {
        "PATCH_SIZE": None,  # pixels
        "PATCH_STRIDE": None,  # pixels
        "PATCH_PADDING": None,  # pixels
        "HIDDEN_DIM": None,  # channels
        "DEPTH": None,  # blocks
        "NUM_HEADS": None,  # must divide HIDDEN_DIM
        "MLP_RATIO": None,  # hidden width of the MLP over HIDDEN_DIM
        "LN_EPS": 1e-6,  # > 0
        "DROP_RATE": None,  # dropout of tokens, attention output and MLP, [0, 1)
        "DROP_PATH_RATE": None,  # stochastic depth of the last block, [0, 1)
        "ATTENTION_DROP_RATE": None,  # dropout of attention weights, [0, 1)
    },
    "T2T": {"TOKEN_DIM": 64, "KERNEL_SIZE": [7, 3, 3], "STRIDE": [4, 2, 2], "PADDING": [2, 1, 1]},
    "PIT": {"STRIDE": 8},  # of the patch convolution, pixels
    "PVT": {"SR_RATIO": [8, 4, 2, 1]},  # spatial reduction of keys and values, a stage
    "CONVIT": {
        "LOCAL_LAYERS": 10,
        "LOCALITY_STRENGTH": 1.0,
    },  # gated blocks before the class token joins; their initial focus
    "CVT": {
        "WITH_CLS_TOKEN": [False, False, True],
        "QKV_PROJ_METHOD": ["dw_bn", "dw_bn", "dw_bn"],
        "KERNEL_QKV": [3, 3, 3],
        "STRIDE_KV": [2, 2, 2],
        "STRIDE_Q": [1, 1, 1],
        "PADDING_KV": [1, 1, 1],
        "PADDING_Q": [1, 1, 1],
    },
    "DISTILLATION": {
        "ENABLE_INTER": False,  # imitate the guide's feature maps
        "INTER_TRANSFORM": "linear",  # linear (1x1 convolution heads) | attention | similarity
        "INTER_LOSS": "l2",  # l2
        "INTER_TEACHER_INDEX": [],  # ResNet stages (or timm blocks), from 0
        # student blocks, counted flat across stages, from 0; pairs with the line above
        "INTER_STUDENT_INDEX": [],
        "INTER_WEIGHT": 2.5,  # factor of the summed imitation losses, >= 0
        # imitate the guide's class scores (DeiT then has its distillation token)
        "ENABLE_LOGIT": False,
        # soft (KL divergence at LOGIT_TEMP, times LOGIT_TEMP^2) | hard (cross-entropy with its
        # argmax)
        "LOGIT_LOSS": "soft",
        "LOGIT_TEMP": 1.0,  # > 0
        # [0, 1]: weight of the logit loss; the classification loss gets the rest
        "LOGIT_WEIGHT": 0.5,
        "TEACHER_MODEL": "ResNet",  # ResNet (CNN.* and RESNET.* describe it) | timm/NAME
        "TEACHER_WEIGHTS": None,  # path or URL of the trained guide; needed for training
        # side to which the student's batch is resized for the guide, pixels
        "TEACHER_IMG_SIZE": 32,
        # (+) eval: frozen statistics; batch: statistics of the batch, as in the published runs
        "TEACHER_BN": "eval",
        "OFFLINE": False,  # replay stored guide features instead of running the guide
        "FEATURE_FILE": None,  # where they are stored, by precompute_feature.py
        # (+) file: read from there batch by batch; device: copied to the GPU (or memory) at the
        # start
        "FEATURE_PLACE": "file",
    },
    "OPTIM": {
        "OPTIMIZER": "sgd",  # sgd | adam | adamw
        "BASE_LR": 0.1,  # learning rate after warm-up, > 0
        "MIN_LR": 0.0,  # where cos, lin and exp end, [0, BASE_LR]; exp needs > 0
        "HEAD_LR_RATIO": 1.0,  # learning rate of the classifier over that of the body, > 0
        "LR_POLICY": "cos",  # cos | lin | exp | steps; changes once an epoch
        "STEPS": [],  # epochs at which `steps` multiplies by LR_MULT
        "LR_MULT": 0.1,  # (0, 1]
        "MAX_EPOCH": 200,  # >= 1
        "MOMENTUM": 0.9,  # sgd
        "DAMPENING": 0.0,  # sgd
        "NESTEROV": True,  # sgd; needs MOMENTUM > 0 and DAMPENING 0
        "BETA1": 0.9,  # adam, adamw
        "BETA2": 0.999,  # adam, adamw
        "WEIGHT_DECAY": 5e-4,  # not on biases, norms, tokens and positions
        "WARMUP_FACTOR": 0.1,  # learning rate of epoch 0 over BASE_LR, when WARMUP_EPOCHS > 0
        "WARMUP_EPOCHS": 0,  # linear, epochs
        # step of the weight average, scaled by BATCH_SIZE / MAX_EPOCH * EMA_UPDATE_PERIOD
        "EMA_ALPHA": 1e-5,
        "EMA_UPDATE_PERIOD": 0,  # optimiser steps between updates of the average; 0: no average
        "CLIP_GRAD_NORM": 0.0,  # (+) largest L2 norm of the whole gradient; 0: no clipping
    },
    "TRAIN": {
        "DATASET": "",  # digits, cifar100, flowers, tiny_imagenet, chaoyang, image_folder
        "SPLIT": "train",
        "BATCH_SIZE": 128,  # images an optimiser step sees, over all processes
        "AUTO_RESUME": True,  # go on from the last checkpoint in OUT_DIR
        "WEIGHTS": "",  # path or URL of weights to start from
        # True: bf16 where the hardware has it, else fp16 with loss scaling
        "MIXED_PRECISION": False,
        "LABEL_SMOOTHING": 0.0,  # [0, 1)
        # Beta(alpha, alpha); 0: off. With CutMix on as well, each batch draws one of the two
        "MIXUP_ALPHA": 0.0,
        "CUTMIX_ALPHA": 0.0,  # Beta(alpha, alpha); 0: off
        # random resized crop, RandAugment, random erasing; False: padded crop
        "STRONG_AUGMENTATION": True,
        "AMP_DTYPE": "auto",  # (+) auto | bf16 | fp16; with MIXED_PRECISION
        # (+) none, or a mode of torch.compile: default | reduce-overhead | max-autotune (the last
        # two with CUDA graphs on GPUs); the first step then waits for the compiler. max-autotune
        # times kernels at each start, so that a resumed run may choose others: not bit-reproducible
        "COMPILE": "none",
        # (+) keep freed memory for the next step: on CPUs pyramids train up to 1.7 times as fast,
        # in up to 13 % more memory (Linux)
        "REUSE_MEMORY": True,
        # (+) let GPUs (and CPUs that can) round the factors of float32 products to TF32, those of
        # resizing images too: faster, 10 bits of mantissa in place of 23
        "TF32": False,
        # (+) part of the training set to use, stratified by class and stable in RNG_SEED, (0, 1]
        "FRACTION": 1.0,
        # (+) micro-batches a batch is split into, to save memory; divides BATCH_SIZE
        "ACCUM_STEPS": 1,
        # (+) several processes: BatchNorm normalises with the statistics of the whole batch rather
        # than of each process's share
        "SYNC_BN": False,
        "HFLIP": 0.5,  # (+) probability of a horizontal flip; 0 for digits, letters and the like
        "KEEP_CHECKPOINTS": 2,  # (+) how many of the last checkpoints stay, >= 1
    },
    "TEST": {
        "DATASET": "",  # as in TRAIN; empty: TRAIN.DATASET
        "SPLIT": "val",  # val and test both name the held-out split where a set has just one
        "BATCH_SIZE": 200,  # over all processes
        "WEIGHTS": "",  # path or URL; --mode test
        "PERIOD": 1,  # (+) epochs between tests during training; the last epoch is always tested
        "PER_CLASS": False,  # (+) --mode test also prints the accuracy of each class
    },
    "DATA_LOADER": {
        # processes that read and augment images, or threads that decode them (one at least); 0: no
        # processes; never more than the machine has cores
        "NUM_WORKERS": 8,
        # (+) workers: processes read and augment images; device: images are decoded once, kept in
        # memory and augmented in batches where training runs; auto: device if they fit
        "BACKEND": "auto",
        # (+) images that cannot be read. stop: the first one ends the run, naming its path; skip:
        # all images are opened once at the start, and those are left out with a warning
        "ON_ERROR": "stop",
        # (+) seconds after which images that do not come, from worker processes or decoding
        # threads, end the run; 0: never
        "TIMEOUT": 600,
        "PIN_MEMORY": True,  # page-locked batches for faster copies to a GPU
        # (+) where the data sets are; image_folder: the folder that holds train/ and test/ or val/
        "ROOT": "data",
        "DOWNLOAD": True,  # (+) fetch a missing set where its makers offer it (cifar100, flowers)
    },
    "CUDNN": {
        "BENCHMARK": True
    },  # time convolution algorithms first; faster, not bit-reproducible on GPUs
    "PREC_TIME": {"WARMUP_ITER": 3, "NUM_ITER": 30},  # --mode time: steps before and while timing
    "LAUNCH": {  # submission to a cluster, with MODE slurm
        # local: here (also under torchrun); slurm: as a job, by submitit; submitit_local: as the
        # same kind of job on this machine, to try it out
        "MODE": "local",
        "MAX_RETRY": 3,  # how often a job whose time is up goes back into the queue, >= 0
        "NAME": "pycls_job",
        "COMMENT": "",
        "CPUS_PER_GPU": 10,  # cores a process, >= 1
        "MEM_PER_GPU": 60,  # GB a process, >= 1
        "PARTITION": "devlab",
        "GPU_TYPE": "volta",  # feature that the machines must have; empty: any
        "TIME_LIMIT": 4200,  # minutes, >= 1
        "EMAIL": "",  # told when the job ends; empty: nobody
    },
    "DESC": "",  # free text, printed at the start
    "VERBOSE": True,  # write the resolved config and the model's complexity to the log
    "NUM_GPUS": 1,  # processes on this machine, one a GPU
    "MAX_GPUS_PER_NODE": 8,
    "OUT_DIR": None,  # null: work_dirs/<config name>
    "CFG_DEST": "config.yaml",  # name of the resolved config in OUT_DIR
    "RNG_SEED": 1,  # >= 0
    "LOG_DEST": "stdout",  # stdout: console and OUT_DIR/log.txt; file: OUT_DIR/log.txt alone
    "LOG_PERIOD": 10,  # steps between log lines
    "DIST_BACKEND": "nccl",  # nccl | gloo; processes without a GPU always use gloo
    "HOST": "localhost",  # where processes of one machine meet
    "PORT_RANGE": [10000, 65000],  # ports tried for that
    "DOWNLOAD_CACHE": "/tmp/pycls-download-cache",  # where files given by URL are kept
    "DEVICE": "auto",  # (+) auto | cpu | cuda | mps
}

# Keys, or their beginnings, that may change between runs: they affect neither what is trained nor
# what it is tested on.
FREE_ON_RESUME = (
    "OUT_DIR",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.TIMEOUT",
    "DATA_LOADER.PIN_MEMORY",
    "DATA_LOADER.DOWNLOAD",
    "TEST.BATCH_SIZE",
    "TEST.WEIGHTS",
    "TEST.PER_CLASS",
    "TEST.PERIOD",
    "TRAIN.KEEP_CHECKPOINTS",
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
