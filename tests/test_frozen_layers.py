"""Which layers learn, in several architectures; and a network that is whole again after it was cut."""
import pytest
import torch

from ecom_importance.finetuning.frozen_layers import find_layers, freeze_layers, without_bottom
from ecom_importance.samples import DataError


def networks():
    from transformers import (BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification, ElectraConfig, ElectraForSequenceClassification, MPNetConfig,
                              MPNetForSequenceClassification, RobertaConfig, RobertaForSequenceClassification)

    small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=1)
    return {"bert": BertForSequenceClassification(BertConfig(**small)), "roberta": RobertaForSequenceClassification(RobertaConfig(**small)), "mpnet": MPNetForSequenceClassification(MPNetConfig(**small)),
            "distilbert": DistilBertForSequenceClassification(DistilBertConfig(vocab_size=60, dim=32, n_layers=3, n_heads=2, hidden_dim=32, num_labels=1)),
            "electra": ElectraForSequenceClassification(ElectraConfig(**small, embedding_size=16))}


def test_freezing_works_for_other_architectures():
    found = networks()
    for name, top in (("roberta", ("roberta.encoder.layer.2.", "classifier.")), ("distilbert", ("distilbert.transformer.layer.2.", "pre_classifier.", "classifier."))):
        freeze_layers(found[name], 1)
        learn = {one for one, parameter in found[name].named_parameters() if parameter.requires_grad}
        assert learn == {one for one, _ in found[name].named_parameters() if one.startswith(top)}


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert"])
def test_a_cut_network_ends_as_the_whole_one_and_comes_back(name):
    torch.manual_seed(0)
    network = networks()[name].eval()
    holder, stack = find_layers(network)
    ids, seen = torch.randint(5, 60, (2, 7)), []
    hook = getattr(holder, stack)[1].register_forward_pre_hook(lambda layer, given, named: seen.append(given[0] if given else named["hidden_states"]), with_kwargs=True)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        whole = network(input_ids=ids, attention_mask=mask).logits
        hook.remove()
        with pytest.raises(ZeroDivisionError), without_bottom(network, 1):
            cut = network(inputs_embeds=seen[0], attention_mask=mask).logits
            1 / 0
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
        torch.testing.assert_close(network(input_ids=ids, attention_mask=mask).logits, whole, atol=0, rtol=0)


def test_a_number_of_layers_that_there_is_not_is_refused():
    with pytest.raises(DataError, match="3 layers"):
        freeze_layers(networks()["bert"], 4)
