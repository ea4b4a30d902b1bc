"""The catalogue of the synthetic data: categories, brands and ads with their popularities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

BRANDS_PER_CATEGORY = 4


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Categories are 0..n-1 (what ads are about), n..2n-1 (announcing), 2n.. (noise only).

    Attributes:
      popularity: [n] shares of the ad categories.
      announcer: [n] the announcing category of an ad category; no raw file says so.
      noise_share: [2n + noise] cumulative shares of noise behaviours.
      category_id, brand_id: raw ids of categories and of brands (category * 4 + 0..3).
      ad_category, ad_brand, ad_quality, ad_price, adgroup_id, campaign_id, customer: [ads];
        ads are sorted by category, ad_brand is -1 where missing.
      first_ad: [n + 1] first ad of every category.
      lean_gender, lean_age: [n] how much a category depends on the profile.
    """

    popularity: np.ndarray
    announcer: np.ndarray
    noise_share: np.ndarray
    category_id: np.ndarray
    brand_id: np.ndarray
    ad_category: np.ndarray
    ad_brand: np.ndarray
    ad_quality: np.ndarray
    ad_price: np.ndarray
    adgroup_id: np.ndarray
    campaign_id: np.ndarray
    customer: np.ndarray
    first_ad: np.ndarray
    lean_gender: np.ndarray
    lean_age: np.ndarray

    def sample_category(self, uniform: np.ndarray, flat: bool = False) -> np.ndarray:
        """Ad categories by popularity, or all alike, from uniform numbers of any shape."""
        if flat:
            return (uniform * len(self.popularity)).astype(np.int64)
        return np.searchsorted(np.cumsum(self.popularity)[:-1], uniform)

    def sample_noise(self, uniform: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.noise_share[:-1], uniform)

    def sample_brand(self, category: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return category * BRANDS_PER_CATEGORY + (uniform**2 * BRANDS_PER_CATEGORY).astype(np.int64)

    def sample_ad(self, category: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Ads of the categories; the first of a category is shown most."""
        count = self.first_ad[category + 1] - self.first_ad[category]
        return self.first_ad[category] + (uniform**1.5 * count).astype(np.int64)


def draw_catalogue(config: Any) -> Catalogue:
    """The catalogue of a SyntheticConfig, drawn from its seed."""
    rng = np.random.default_rng([config.seed, 1])
    n, quiet = config.categories, config.noise_categories
    popularity = 1 / (np.arange(n) + 5.0) ** 0.6
    popularity /= popularity.sum()
    total = 2 * n + quiet
    share = np.concatenate([0.1 * popularity, np.zeros(n), 0.9 * _zipf(quiet)])
    ad_category = np.sort(
        np.concatenate([np.arange(n), rng.choice(n, config.ads - n, p=popularity)])
    )
    ads = len(ad_category)
    brand = ad_category * BRANDS_PER_CATEGORY + rng.integers(0, BRANDS_PER_CATEGORY, ads)
    campaign = rng.permutation(ads) // 2
    customer = campaign // 2
    quality = 0.8 * rng.standard_normal(n)[ad_category] + 0.6 * rng.standard_normal(ads)
    return Catalogue(
        popularity=popularity,
        announcer=n + rng.permutation(n),
        noise_share=np.cumsum(share / share.sum()),
        category_id=1 + rng.choice(12960, total, replace=False)
        if total <= 12960
        else 1 + rng.permutation(total),
        brand_id=1
        + rng.permutation(max(460000, total * BRANDS_PER_CATEGORY))[: total * BRANDS_PER_CATEGORY],
        ad_category=ad_category,
        ad_brand=np.where(rng.random(ads) < 0.25, -1, brand),
        ad_quality=quality,
        ad_price=np.round(np.exp(rng.normal(5.0, 1.2, ads)), 2),
        adgroup_id=1 + rng.choice(max(846811, ads), ads, replace=False),
        campaign_id=1 + rng.permutation(max(423436, ads))[campaign],
        customer=1 + rng.permutation(max(255875, ads))[customer],
        first_ad=np.searchsorted(ad_category, np.arange(n + 1)),
        lean_gender=rng.standard_normal(n),
        lean_age=rng.standard_normal(n),
    )


def _zipf(count: int) -> np.ndarray:
    share = 1 / (np.arange(count) + 2.0)
    return share / share.sum()
