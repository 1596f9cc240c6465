%% The text of this application's log events: see erllama_cache_log.hrl.
%%
%% @private
-module(erllama_cache_log).

-export([text/1, hex/1]).

%% What a handler prints: the event, and its details in words.
-spec text(logger:report()) -> {io:format(), [term()]}.
text(#{event := Event} = Report) ->
    Details = [
        [words(Name), $\s, value(Name, Value)]
     || {Name, Value} <- lists:sort(maps:to_list(maps:remove(event, Report)))
    ],
    {"~ts: ~ts", [Event, lists:join(", ", Details)]}.

words(Name) ->
    string:replace(atom_to_list(Name), "_", " ", all).

%% As the pages name it, and in words.
value(reason, Reason) -> io_lib:format("~0tp (~ts)", [Reason, erllama_cache_error:format(Reason)]);
value(key, Hex) -> Hex;
value(Name, Path) when Name =:= root; Name =:= file ->
    case unicode:characters_to_list(Path) of
        Characters when is_list(Characters) -> Characters;
        _RawBytes -> io_lib:format("~0tp", [Path])
    end;
value(_Name, Value) -> io_lib:format("~0tp", [Value]).

%% A key as it is printed, and as its file is called.
-spec hex(erllama_cache_nif:key()) -> binary().
hex(Key) ->
    string:lowercase(binary:encode_hex(Key)).
