%% The node's secret. Digests keyed with it prove that a file was made by a node that has it.
%%
%% A server reads it once, when it starts, and keeps it in a resource object of the NIF library. So
%% no term that is logged, copied into a crash report or shown by an info call has its bytes.
%%
%% @private
-module(erllama_cache_secret).

-export([read/1]).
-export_type([source/0]).

-type source() :: {file, file:name_all()} | fun(() -> <<_:256>>) | undefined.
%% A file of 32 bytes, or of 64 hexadecimal digits and perhaps a line's end; or a function that
%% returns the 32 bytes.

%% `none' when there is no source. No error contains a byte of what was read.
-spec read(source()) -> {ok, none | erllama_cache_nif:secret()} | {error, {mac_key, Reason}} when
    Reason :: file:posix() | badarg | bad_key | raised.
read(undefined) ->
    {ok, none};
read({file, Path}) ->
    case file:read_file(Path) of
        {ok, Contents} -> secret(unhex(Contents));
        {error, Reason} -> {error, {mac_key, Reason}}
    end;
read(Fun) when is_function(Fun, 0) ->
    try
        secret(Fun())
    catch
        %% What it raises may have the key in it, and its stack the arguments.
        _:_ -> {error, {mac_key, raised}}
    end.

secret(<<_:256>> = Key) -> {ok, erllama_cache_nif:secret_new(Key)};
secret(_) -> {error, {mac_key, bad_key}}.

unhex(<<Hex:64/binary, Rest/binary>>) when Rest =:= <<>>; Rest =:= <<"\n">>; Rest =:= <<"\r\n">> ->
    try
        binary:decode_hex(Hex)
    catch
        error:badarg -> bad_key
    end;
unhex(Contents) ->
    Contents.
