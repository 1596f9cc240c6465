%% Paths: of a root as the system wants it, and of a key's file in it.
%%
%% @private
-module(erllama_cache_path).

-export([native/1, absolute/1, final/2]).
-export_type([unusable/0]).

-type unusable() :: badarg | {unencodable, latin1 | utf8}.
%% No root's name, or one that has a NUL; one that has characters that this emulator's encoding of
%% file names has not.

%% A root as the system wants it: a binary is a raw path already, a string is encoded as the
%% emulator encodes file names.
-spec native(file:name_all()) -> {ok, erllama_cache_nif:root()} | {error, unusable()}.
native(Root) when is_binary(Root) ->
    without_nul(Root);
native(Root) when is_list(Root) ->
    Encoding = file:native_name_encoding(),
    try unicode:characters_to_binary(Root, unicode, Encoding) of
        Path when is_binary(Path) -> without_nul(Path);
        _Unencodable -> {error, {unencodable, Encoding}}
    catch
        error:badarg -> {error, badarg}
    end;
native(_Root) ->
    {error, badarg}.

without_nul(Path) ->
    case binary:match(Path, <<0>>) of
        nomatch -> {ok, Path};
        _ -> {error, badarg}
    end.

%% A root that is the same directory whatever becomes of the node's current one, and that as the
%% system wants it. An empty name stays empty: it is no name of the current directory.
-spec absolute(file:name_all()) ->
    {ok, file:name_all(), erllama_cache_nif:root()} | {error, unusable() | file:posix()}.
absolute(Root) ->
    case native(Root) of
        {ok, <<>>} -> {ok, Root, <<>>};
        {ok, <<"/", _/binary>> = Path} -> {ok, Root, Path};
        {ok, _Relative} -> below_current(Root);
        {error, _} = Error -> Error
    end.

below_current(Root) ->
    case file:get_cwd() of
        {ok, Current} ->
            Absolute = filename:absname(Root, Current),
            case native(Absolute) of
                {ok, Path} -> {ok, Absolute, Path};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% Where a key's file stands, as a string or a binary like the root.
-spec final(file:name_all(), erllama_cache_nif:key()) -> file:filename_all().
final(Root, Key) when is_binary(Root), binary_part(Root, byte_size(Root), -1) =/= <<"/">> ->
    <<Root/binary, $/, <<<<(hex(Nibble))>> || <<Nibble:4>> <= Key>>/binary, ".kvc">>;
final(Root, Key) ->
    %% A string, for joined with a binary a string becomes one.
    filename:join(Root, [hex(Nibble) || <<Nibble:4>> <= Key] ++ ".kvc").

hex(Nibble) when Nibble < 10 -> $0 + Nibble;
hex(Nibble) -> $a + Nibble - 10.
