"""`--mode doctor`: find what would stop a training or spoil its result, before it starts."""

from lg.tools.doctor.checkup import doctor
