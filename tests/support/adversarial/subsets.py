"""Which cases go through the transformations that are not applied to all of them."""

# The gradient of each argument alone.
PARTS = (
    "flax_gru",
    "used_in_products_of_carry_and_of_x",
    "shared_left_operand",
    "embedding_tied_to_the_output",
    "fast_weights",
    "leaf_passed_on_unchanged",
    "outputs_of_every_kind",
    "scan_over_layers_with_a_carry_each",
    "own_gradient_of_a_product",
    "single_product_in_a_double_step",
)

# The gradient of a batch: what is batched, of the float inputs in the order of parameters, first carry, xs.
BATCHES = (
    ("bias", "first"),
    ("used_in_products_of_carry_and_of_x", "last"),
    ("shared_left_operand", "first"),
    ("shared_left_operand", "last"),
    ("made_from_a_weight", "all"),
    ("made_by_a_product_with_x", "last"),
    ("weights_per_head", "first"),
    ("weights_and_xs_on_either_side", "last"),
    ("convolution_of_carry_and_of_x", "first"),
    ("read_only_in_the_carry", "first"),
    ("leaf_passed_on_unchanged", "last"),
    ("outputs_of_every_kind", "first"),
    ("outputs_of_every_kind", "last"),
    ("scan_over_parts_of_x", "last"),
    ("own_gradient_of_a_product", "first"),
    ("dropout_with_rbg_keys_in_xs", "last"),
    ("outputs_of_every_kind", "carry"),
    ("ignores_its_carry", "carry"),
    ("shift_register", "carry"),
    ("leaf_overwritten_by_a_function_of_x", "carry"),
    ("leaf_passed_on_unchanged", "carry"),
)

# Differentiated backwards twice through a plan that computes again, which takes long to compile.
TWICE = (
    "shared_left_operand",
    "made_from_a_weight",
    "own_gradient_of_the_carry",
    "own_gradient_of_x",
    "bent_gradient_of_the_weight",
    "own_tangent",
)

# More steps, and budgets.
LONG = ("used_in_products_of_carry_and_of_x", "shared_left_operand", "outputs_of_every_kind", "reset_by_a_mask")

# What is batched has no derivative: tokens, masks, keys.
UNEVEN = (
    "embedding_tied_to_the_output",
    "chosen_by_x",
    "switch_on_x",
    "integers_and_bools",
    "reset_by_a_mask",
    "drawn_from_x_alone",
    "accepted_by_chance_of_the_carry",
)
