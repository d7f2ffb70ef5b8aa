"""What the benchmark holds against each other, by name, in the order of its tables."""

FROZEN, LOGISTIC = "frozen + imprinted head", "frozen + logistic regression"
SHARED, MEAN, NEAREST = "one shared adapter", "mean of the training adapters", "nearest training adapter"
MIXED = "mix of training adapters (LoraHub)"
REPTILE = "REPTILE start + gradient steps"
GRADIENT, GRADIENT_TIME = "gradient LoRA, equal shots", "gradient LoRA, equal time"
SETFIT, CEILING = "SetFit", "LoRA on all data"
SINGLE_LEVEL, MV_DI, TW_DI = "single level (OCD)", "Mv-Di", "Tw-Di"
ONE_DRAW, MC_DI = "Mc-Di, one draw", "Mc-Di"
SHUFFLED, NOISE = "Mc-Di, another task's condition", "Mc-Di, a condition of noise"
NOISED, PCA_SAMPLE = "nearest training adapter + noise", "PCA sample of training adapters"

RIVALS = [FROZEN, LOGISTIC, SHARED, MEAN, NEAREST, MIXED, REPTILE, GRADIENT, GRADIENT_TIME, SETFIT]
GENERATED = [SINGLE_LEVEL, MV_DI, TW_DI, ONE_DRAW, MC_DI]
CONTROLS = [SHUFFLED, NOISE, NOISED, PCA_SAMPLE]
WAYS = [*RIVALS, CEILING, *GENERATED, *CONTROLS]
