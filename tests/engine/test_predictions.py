import pytest
import torch
from boostdiff.engine.predictions import noise_from_prediction, x_from_prediction
from diffusers import DDIMScheduler

SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
T = torch.tensor([3, 200, 500, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_image_and_noise_are_recovered_exactly_from_each_prediction_type(prediction_type: str) -> None:
    x, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    alphas_cumprod = SCHEDULER.alphas_cumprod[T].double()[:, None, None, None]
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if prediction_type == "flow_prediction":
        alpha = 1 - sigma
    z_t = alpha * x + sigma * noise
    prediction = {
        "epsilon": noise,
        "v_prediction": SCHEDULER.get_velocity(x, noise, T),
        "sample": x,
        "flow_prediction": noise - x,
    }[prediction_type]
    torch.testing.assert_close(x_from_prediction(prediction, z_t, alpha, sigma, prediction_type), x)
    torch.testing.assert_close(noise_from_prediction(prediction, z_t, alpha, sigma, prediction_type), noise)


@pytest.mark.parametrize("function", [x_from_prediction, noise_from_prediction])
def test_an_unknown_prediction_type(function: object) -> None:
    with pytest.raises(ValueError, match="flow"):
        function(*torch.zeros(4, 1), "flow")  # type: ignore[operator]
