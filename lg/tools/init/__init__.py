"""`--mode init`: configs for a folder of images."""

from lg.tools.init.command import init
