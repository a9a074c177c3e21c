"""Block-removed Stable Diffusion backbones: surgery, distillation objective, training."""
