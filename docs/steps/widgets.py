"""Turn figures and widgets into HTML that needs no kernel: plotly figures stay alive, controls become words that say how they stood."""
import copy
import html
import json
import re

state_type = 'application/vnd.jupyter.widget-state+json'
short_types = {'float32': 'f4', 'float64': 'f8', 'int8': 'i1', 'int16': 'i2', 'int32': 'i4', 'uint8': 'u1', 'uint16': 'u2', 'uint32': 'u4'}


def show_plotly(data):
    """Return a plotly figure as HTML that site.js draws when the page is open."""
    figure = {'data': data.get('data', []), 'layout': data.get('layout', {}), 'config': data.get('config', {})}
    height = figure['layout'].get('height', 450)
    return f'<div class="plotly-figure" style="min-height:{int(height)}px"><script type="application/json">{json.dumps(figure).replace("</", "<" + chr(92) + "/")}</script></div>'


def fill_buffers(model):
    """Return a widget's state with the arrays and pictures, which are kept beside it in base64, put where they belong."""
    state = copy.deepcopy(model['state'])
    for buffer in model.get('buffers', []):
        place = state
        for step in buffer['path'][:-1]:
            try:
                place = place[step]
            except (KeyError, IndexError, TypeError):
                break  # a message that was sent and taken back
        else:
            if isinstance(place, dict):
                place[buffer['path'][-1]] = buffer['data']
    return state


def write_arrays(value):
    """Return the data of a figure with its binary arrays as plotly.js reads them."""
    if isinstance(value, dict) and {'dtype', 'shape', 'buffer'} <= set(value):
        return {'dtype': short_types[value['dtype']], 'bdata': value['buffer'], 'shape': ','.join(map(str, value['shape']))}
    if isinstance(value, dict):
        return {key: write_arrays(item) for key, item in value.items()}
    return [write_arrays(item) for item in value] if isinstance(value, list) else value


def is_hidden(state, models):
    """Say whether the layout of a widget hides it."""
    layout = models.get(str(state.get('layout')).removeprefix('IPY_MODEL_'), {}).get('state', {})
    return layout.get('display') == 'none' or layout.get('visibility') == 'hidden'


def write_control(state):
    """Return a control as words: what it is called and what it says."""
    labels, index = state.get('_options_labels'), state.get('index')
    value = labels[index] if labels and isinstance(index, int) and index < len(labels) else state.get('value', '')
    words = ' '.join(str(part) for part in (state.get('description', ''), value) if str(part).strip())
    return f'<span class="control">{html.escape(words)}</span>' if words else ''


def freeze_model(identity, models):
    """Return the HTML of a widget and all that it holds; None where something of it was not kept."""
    if identity not in models:
        return None
    state = fill_buffers(models[identity])
    if is_hidden(state, models):
        return ''
    if '_widget_data' in state:
        return show_plotly({'data': write_arrays(state['_widget_data']), 'layout': write_arrays(state.get('_widget_layout') or {})})
    if 'children' in state:
        parts = [freeze_model(child.removeprefix('IPY_MODEL_'), models) for child in state['children']]
        if None in parts:
            return None
        kind = 'row' if state['_model_name'] == 'HBoxModel' else 'column'
        return f'<div class="widget-{kind}">{"".join(parts)}</div>' if any(parts) else ''
    if state['_model_name'].startswith('HTML'):
        return f'<div>{re.sub("<style.*?</style>", "", state["value"], flags=re.S)}</div>'
    if state['_model_name'] == 'ImageModel':
        return f'<img src="data:image/{state.get("format") or "png"};base64,{state["value"]}" alt="">' if state.get('value') else ''
    return f'<span>{html.escape(state["value"])}</span>' if state['_model_name'] == 'LabelModel' else write_control(state)


def freeze_widget(data, widgets):
    """Return a widget's view as HTML; None where it cannot be shown without a kernel."""
    frozen = freeze_model(data['model_id'], widgets.get(state_type, {}).get('state', {}))
    return f'<div class="widget-frozen">{frozen}</div>' if frozen else None
